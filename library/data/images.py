"""Pictures from the disk: which there are, how large they stand upright, and their pixels as 8-bit RGB of one size."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from library.config.errors import UserError
from library.data.crops import true_crop_ltrb
from library.sdxl.sizes import Size

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Suffixes of the files taken for pictures, in lower case; files may spell them in any case."""

# What Pillow raises while it decodes a damaged file, beside the two errors that get a separate message.
_DECODING_ERRORS = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)
_WIDE_GREY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class UnusableImage(UserError):
    """A file that cannot be used as a picture; the message names the file and says why."""


def list_images(folder: Path, *, recursive: bool) -> list[Path]:
    """The pictures in `folder`, by suffix, sorted; with `recursive` those of its subfolders too. May be empty.

    Hidden files and folders (name starts with a dot) are left out. Links to folders are followed, but never round in
    circles. Raises `UserError` if the folder does not exist or cannot be read.
    """
    try:
        found = list(_walk(folder, recursive, frozenset()))
    except OSError as error:
        raise UserError(
            f"cannot read the picture folder '{folder}': {error.strerror or error}.", "Give the folder of the pictures."
        ) from error
    return sorted(found, key=lambda path: path.as_posix())


def find_images(folder: Path, *, recursive: bool) -> list[Path]:
    """As `list_images`, and a `UserError` if there is none."""
    images = list_images(folder, recursive=recursive)
    if not images:
        where = "it and its subfolders hold" if recursive else "it holds"
        raise UserError(
            f"no pictures in '{folder}': {where} no file that ends in {', '.join(sorted(IMAGE_SUFFIXES))}.",
            "Give the folder of the pictures." if recursive else "Give the folder of the pictures, or --recursive.",
        )
    return images


def load_rgb(path: Path) -> Image.Image:
    """The picture as 8-bit RGB, upright; raises as `load_rgb_and_alpha`, which says what is done to it."""
    return load_rgb_and_alpha(path)[0]


def load_rgb_and_alpha(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """The picture as 8-bit RGB on white, and its alpha (mode L, 255 is opaque), None if the file has none.

    It is turned as EXIF says. Animated files give their first frame. Every mode becomes RGB; grey of more than 8 bits
    is scaled so that the full range becomes 0-255. Colour profiles are not applied, as in the reference. Raises
    `UnusableImage`.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _WIDE_GREY_MODES:
            upright = _eight_bit_grey(path, upright)
        if not upright.has_transparency_data:
            return upright.convert("RGB"), None
        # Premultiplied grey has no way to RGBA but by way of plain grey with alpha.
        rgba = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    alpha = rgba.getchannel("A")
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=alpha)
    return rgb, alpha


def read_size(path: Path) -> Size:
    """Return the upright size of the image, as of `load_rgb`, without decoding its pixels. Raise `UnusableImage`."""
    with _opened(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whether Pillow has turned its size already depends on the version
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return Size(height, width) if _orientation(image) in _ORIENTATIONS_ON_THE_SIDE else Size(width, height)


def resize_and_crop(image: Image.Image, resized: Size, bucket: Size) -> np.ndarray:
    """The centre of the picture: resized to `resized`, cropped to `bucket`; uint8 (H, W, 3) for RGB, (H, W) for a mask.

    As in the reference, shrinking averages areas (each pixel counts by the part of it that is covered) and enlarging
    uses Lanczos. The crop is `true_crop_ltrb`.
    """
    left, top, right, bottom = true_crop_ltrb(bucket, resized)
    if resized.width <= image.width and resized.height <= image.height:
        rows = _average_rows(np.asarray(image), resized.height, range(top, bottom))
        columns = _average_rows(rows.swapaxes(0, 1), resized.width, range(left, right))
        return np.ascontiguousarray((columns.swapaxes(0, 1) + 0.5).astype(np.uint8))
    enlarged = image.resize(resized, Image.Resampling.LANCZOS)
    return np.array(enlarged.crop((left, top, right, bottom)))


def _average_rows(pixels: np.ndarray, num_rows: int, kept: range) -> np.ndarray:
    """Rows `kept` of the (H, W, ...) picture shrunk to `num_rows`, float32: means of the rows that each one covers.

    Pillow's BOX filter does not serve: it counts a row wholly or not at all, so that a picture a little larger than
    its bucket would lose whole rows instead of being averaged.
    """
    scale = len(pixels) / num_rows
    averaged = np.empty((len(kept), *pixels.shape[1:]), dtype=np.float32)
    for row, source_row in enumerate(kept):
        start, end = source_row * scale, (source_row + 1) * scale
        covered = np.arange(int(start), min(int(np.ceil(end)), len(pixels)))
        weights = np.minimum(covered + 1, end) - np.maximum(covered, start)
        weights = (weights / weights.sum()).astype(np.float32)
        averaged[row] = np.tensordot(weights, pixels[covered[0] : covered[-1] + 1].astype(np.float32), axes=1)
    return averaged


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The open picture; whatever is wrong with the file, here or while the block decodes it, is `UnusableImage`."""
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        reason = "the file is empty" if path.stat().st_size == 0 else "it is not a picture of a known format"
        raise _unusable(path, reason) from error
    except Image.DecompressionBombError as error:
        raise _unusable(path, f"it has too many pixels ({error})") from error
    except _DECODING_ERRORS as error:
        reason = "it is a folder" if path.is_dir() else getattr(error, "strerror", None) or str(error)
        raise _unusable(path, reason) from error


def _unusable(path: Path, reason: str) -> UnusableImage:
    return UnusableImage(f"'{path}' cannot be used: {reason}.", "Replace the file or remove it.")


def _walk(folder: Path, recursive: bool, above: frozenset[Path]) -> Iterator[Path]:
    here = above | {folder.resolve()}
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if recursive and entry.resolve() not in here:
                yield from _walk(entry, recursive, here)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            yield entry


def _eight_bit_grey(path: Path, image: Image.Image) -> Image.Image:
    """Mode L from grey of 16 bits (white is 65535), 32 bits (likewise) or floats (white is 1, 255 or 65535)."""
    values = np.asarray(image).astype(np.float64)
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((white for white in whites if values.max() <= white), None)
    if white is None or not values.min() >= 0:
        raise _unusable(
            path, f"its grey values go from {values.min():g} to {values.max():g}, which leaves open what is white"
        )
    grey = Image.fromarray((values * 255 / white + 0.5).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a whole PNG to see whether EXIF data follow the pixels; they seldom do, and a look at the chunk
    # names tells.
    if isinstance(image, PngImageFile) and image.fp is not None and not _has_text_after_pixels(image.fp):
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    return exif.get(ExifTags.Base.Orientation, 1)


def _has_text_after_pixels(png: IO[bytes]) -> bool:
    """Whether chunks that may hold an orientation (EXIF, or XMP as text) follow the pixels of the open PNG."""
    position = png.tell()
    png.seek(len(b"\x89PNG\r\n\x1a\n"))
    chunk_names = []
    while len(header := png.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        chunk_names.append(name)
        png.seek(length + 4, 1)  # past the content and its checksum
    png.seek(position)
    after_pixels = chunk_names[chunk_names.index(b"IDAT") :] if b"IDAT" in chunk_names else []
    return any(name in after_pixels for name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"))
