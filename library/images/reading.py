"""An image from the disk: how large it is upright, and its pixels as 8-bit RGB of one size."""

import io
import logging
import stat
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from library.config.errors import UserError
from library.images.ends import seems_whole
from library.images.jxl_header import declared_pixels
from library.images.kinds import format_lacking_package, readable_formats, remedy_for
from library.images.png_chunks import Png, needed_part
from library.images.resizing import LARGE_PIXELS, resize_and_crop
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

LARGEST_IMAGE = 400_000_000
"""Pixels of the largest image that is read: 20,000 x 20,000 take a few GB of memory while they are prepared."""

DECODING_SECONDS = 120.0
"""How long a processor may work on decoding one image."""

# What decoders raise for a damaged file, beside the errors that get a separate message.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(EOFError, struct.error, zlib.error),
    RuntimeError,  # RecursionError too
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by its EXIF orientation."""
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)
_WIDE_GREY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_GREY_ROWS_AT_ONCE = 256

_one_large_image = threading.Lock()


class UnusableImage(UserError):
    """A file that cannot be used as an image; the message names the file and says why."""


class CroppedImage(NamedTuple):
    """An image at the size of its bucket: uint8 (H, W, 3), a mask (H, W); and its opacity (H, W) if it has any."""

    pixels: np.ndarray
    alpha: np.ndarray | None


def load_cropped(
    path: Path,
    resized: Size,
    bucket: Size,
    *,
    corner: tuple[int, int] | None = None,
    interpolation: str | None = None,
    is_mask: bool = False,
) -> CroppedImage:
    """Return the image resized and cropped as by `resize_and_crop`; of large images, one at a time is in memory.

    Of a mask it is the first channel, transparent parts black. Whatever goes wrong raises `UnusableImage`.
    """
    with _opened(path) as opened, _one_large_image if opened.num_pixels > LARGE_PIXELS else nullcontext():
        image, alpha = (_first_channel(path, opened), None) if is_mask else _rgb_and_alpha(path, opened)
        fitted = partial(resize_and_crop, resized=resized, bucket=bucket, corner=corner, interpolation=interpolation)
        return CroppedImage(fitted(image), None if alpha is None else fitted(alpha))


def load_rgb(path: Path, edge: int | None = None) -> Image.Image:
    """Return the image of `load_rgb_and_alpha` alone; a JPEG reduced while it is decoded, to no less than `edge`."""
    with _opened(path) as opened:
        if edge is not None:
            opened.image.draft("RGB", (edge, edge))
        return _rgb_and_alpha(path, opened)[0]


def load_rgb_and_alpha(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Return the image as 8-bit RGB on white, and its alpha (mode L, 255 is opaque), None if the file has none.

    It is turned as EXIF says. Animated files count by their first frame. Every mode becomes RGB; grey of more than 8
    bits is scaled so that the full range becomes 0-255. Colour profiles are not applied, as in the reference. Raises
    `UnusableImage`.
    """
    with _opened(path) as opened:
        return _rgb_and_alpha(path, opened)


def load_mask(path: Path) -> Image.Image:
    """Return the first channel of a mask (mode L), upright; transparent parts are black. Raises `UnusableImage`."""
    with _opened(path) as opened:
        return _first_channel(path, opened)


def has_alpha(path: Path) -> bool:
    """Return whether the file has an alpha channel, without decoding its pixels; raises `UnusableImage`."""
    with _opened(path) as opened:
        return bool(opened.image.has_transparency_data)


def read_size(path: Path) -> Size:
    """Return the size of the image that `load_rgb` returns, without decoding its pixels; raises `UnusableImage`."""
    with _opened(path) as opened:
        width, height = opened.image.size
        if isinstance(opened.image, TiffImageFile):  # whether Pillow has turned its size depends on the version
            width, height = opened.image.tag_v2[IMAGEWIDTH], opened.image.tag_v2[IMAGELENGTH]
        orientation = _orientation(opened)
        if orientation is None:
            log.warning("'%s': its EXIF data are damaged; it is used as it lies in the file", path)
        return Size(height, width) if orientation in _ORIENTATIONS_ON_THE_SIDE else Size(width, height)


def require_whole(path: Path) -> None:
    """Raise `UnusableImage` for a file that was cut short; only one without the end of its format is decoded."""
    try:
        with path.open("rb") as file:
            is_whole = seems_whole(file)
    except OSError as error:
        _refuse(path, error.strerror or str(error), error)
    if not is_whole:
        load_rgb(path)


class _Opened(NamedTuple):
    image: Image.Image
    png: Png | None

    @property
    def num_pixels(self) -> int:
        return self.image.width * self.image.height


class _Timed(io.RawIOBase):
    """A file that raises `_TookTooLong` when it is read on after `DECODING_SECONDS` of work of this thread.

    Decoders ask for a file piece by piece: one that would decode the same pixels thousands of times is stopped, as no
    thread can be stopped from outside.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._end = time.thread_time() + DECODING_SECONDS

    def read(self, size: int = -1) -> bytes:
        if time.thread_time() > self._end:
            raise _TookTooLong
        return self._file.read(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()  # libtiff reads by itself


class _TookTooLong(Exception):
    pass


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    """The open image; whatever is wrong with the file, here or while the block decodes it, is `UnusableImage`."""
    try:
        _require_regular_file(path)
        with path.open("rb") as file:
            if declared_pixels(file) > LARGEST_IMAGE:
                raise Image.DecompressionBombError
            png = needed_part(file)
            timed = cast(BinaryIO, _Timed(file if png is None else png.file))
            with Image.open(timed, formats=_formats()) as image:
                opened = _Opened(image, png)
                if opened.num_pixels > LARGEST_IMAGE:
                    raise Image.DecompressionBombError
                yield opened
    except UnidentifiedImageError as error:
        _refuse_unknown(path, error)
    except Image.DecompressionBombError as error:
        _refuse(path, f"it has too many pixels, more than {LARGEST_IMAGE:,}", error)
    except _TookTooLong as error:
        _refuse(path, f"it takes longer to decode than {DECODING_SECONDS:g} seconds", error)
    except MemoryError as error:
        _refuse(path, "there is not enough memory for it", error)
    except _DECODING_ERRORS as error:
        _refuse(path, getattr(error, "strerror", None) or str(error) or type(error).__name__, error)


def _require_regular_file(path: Path) -> None:
    """Refuse what is no plain file: opening a pipe would wait for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        _refuse(path, f"it is {next((kind for kind, is_it in kinds.items() if is_it(mode)), 'a device')}, not a file")


def _refuse(path: Path, reason: str, error: Exception | None = None) -> NoReturn:
    raise UnusableImage(f"'{path}' cannot be used: {reason}.", "Replace the file or remove it.") from error


def _refuse_unknown(path: Path, error: Exception) -> NoReturn:
    with path.open("rb") as file:
        head = file.read(16)
    lacking = format_lacking_package(head)
    if lacking is not None and lacking not in readable_formats():
        raise UnusableImage(f"'{path}' cannot be used: it is a {lacking} file.", remedy_for(lacking)) from error
    _refuse(path, "it is not an image of a known format" if head else "the file is empty", error)


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow may take a file for (of all that it knows, some start other programs).

    Its own limit of pixels is out of the way after this.
    """
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused
    return readable_formats()


def _first_channel(path: Path, opened: _Opened) -> Image.Image:
    return _rgb_and_alpha(path, opened, background="black")[0].getchannel("R")


def _rgb_and_alpha(path: Path, opened: _Opened, background: str = "white") -> tuple[Image.Image, Image.Image | None]:
    image = opened.image
    image.load()
    turn = _TURNS.get(_orientation(opened) or 1)
    upright = image if turn is None else image.transpose(turn)
    if upright.mode in _WIDE_GREY_MODES:
        upright = _eight_bit_grey(path, upright)
    if not upright.has_transparency_data:
        return upright if upright.mode == "RGB" else upright.convert("RGB"), None
    # Premultiplied grey has no way to RGBA but by way of plain grey with alpha.
    rgba = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    alpha = rgba.getchannel("A")
    rgb = Image.new("RGB", rgba.size, background)
    rgb.paste(rgba, mask=alpha)
    return rgb, alpha


def _eight_bit_grey(path: Path, image: Image.Image) -> Image.Image:
    """Mode L from grey of 16 bits (white is 65535), 32 bits (likewise) or floats (white is 1, 255 or 65535)."""
    values = np.asarray(image)
    darkest, lightest = float(values.min()), float(values.max())
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((white for white in whites if lightest <= white), None)
    if white is None or not darkest >= 0:
        _refuse(path, f"its grey values go from {darkest:g} to {lightest:g}, which leaves open what is white")
    grey = np.empty(values.shape, dtype=np.uint8)
    for first in range(0, len(values), _GREY_ROWS_AT_ONCE):  # in float64 the whole would be eight times as large
        rows = slice(first, first + _GREY_ROWS_AT_ONCE)
        grey[rows] = values[rows].astype(np.float64) * 255 / white + 0.5
    made = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if transparent is not None:
        made.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return made


def _orientation(opened: _Opened) -> int | None:
    """The EXIF orientation, 1 if none is given, None if the data are damaged."""
    image, png = opened
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # the format says it by itself, and has EXIF ignored
    try:
        # Pillow decodes a whole PNG to see whether EXIF data follow the pixels; they seldom do.
        exif = Image.Image.getexif(image) if png is not None and not png.turns_late else image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except _DECODING_ERRORS:
        return None
    return None if png is not None and png.lost_notes and orientation == 1 else orientation
