"""Which kinds of image files can be read here, and what those that cannot would need."""

import importlib
import importlib.util
import logging
import os
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

FORMATS_FILE = "requirements-formats.txt"

_SUFFIXES_OF = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "QOI": (".qoi",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
"""Suffixes of the files that are taken for images, in lower case, by Pillow's name of the format."""

FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES_OF.items() for suffix in suffixes}

_NEVER_READ = frozenset(
    {
        *(".ai", ".clip", ".eps", ".kra", ".psb", ".psd", ".sai", ".svg", ".xcf"),
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
        *(".bpg", ".cur", ".dds", ".exr", ".flif", ".hdp", ".hdr", ".ico", ".jxr", ".pcx", ".sgi", ".tga", ".wdp"),
    }
)
"""Suffixes of images that are not read: working files, raw photographs, drawings and rare formats."""

_PACKAGES = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
"""Module and name of the optional package for a format."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats that can be read with what is installed, by Pillow's names."""
    from PIL import Image  # which a first answer need not wait for

    Image.init()
    for module, package in _PACKAGES.values():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            plugin = importlib.import_module(module)  # pillow_jxl registers itself
            if module == "pillow_heif":
                plugin.register_heif_opener()
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            log.warning("the package %s is installed but cannot be used: %s", package, error)
    return tuple(name for name in _SUFFIXES_OF if name in Image.OPEN)


def is_readable(path: Path) -> bool:
    """Return whether the suffix is that of an image that can be read here."""
    return FORMAT_OF_SUFFIX.get(path.suffix.lower()) in readable_formats()


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the images that can be read here."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in FORMAT_OF_SUFFIX.items() if name in formats)


@cache
def suffixes_of_images() -> frozenset[str]:
    """Return the suffixes, in lower case, of images of any kind, those that cannot be read included."""
    return frozenset(FORMAT_OF_SUFFIX) | _NEVER_READ


def suffix_of(path: str) -> str:
    """Return the suffix of a path in lower case, as `Path.suffix` has it, in a tenth of the time."""
    return os.path.splitext(path)[1].lower()  # noqa: PTH122


def without_suffix(path: str | Path) -> str:
    """Return a path without its suffix, in a tenth of the time of `Path.with_suffix`."""
    return os.path.splitext(path)[0]  # noqa: PTH122


def is_image_of_any_kind(name: str) -> bool:
    """Return whether the suffix of a file name is that of an image, be it one that cannot be read."""
    return suffix_of(name) in suffixes_of_images()


def remedy_for(format_name: str | None) -> str:
    """Return what makes files of a format usable that cannot be read here (None: one that never can)."""
    if format_name in _PACKAGES:
        return f"Install {_PACKAGES[format_name][1]} (pip install -r {FORMATS_FILE}), or convert to PNG or JPEG."
    return "Convert to PNG or JPEG."


def format_lacking_package(head: bytes) -> str | None:
    """Return the format of which these are the first 16 bytes, if it is one that an optional package would read."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return "HEIF"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n")):
        return "JXL"
    return None
