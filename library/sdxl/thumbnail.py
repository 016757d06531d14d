"""The preview of a model in its header: an image as a small JPEG in a data URL."""

import base64
import binascii
import io
from pathlib import Path

from PIL import Image, ImageOps

from library.config.errors import UserError

SIDE = 256
"""Pixels: the size that the specification recommends, which bounds what the header grows by."""
_QUALITY = 85
_DATA = "data:"
_MOST_PIXELS = 400_000_000
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for a damaged image."""


def thumbnail_of(source: str) -> str:
    """Return the data URL of a thumbnail; `source` is an image file or a data URL of an image.

    Raise `UserError` if it is neither.
    """
    if source.startswith(_DATA):
        return _thumbnail(io.BytesIO(_decoded(source)), "the data URL")
    path = Path(source)
    try:
        is_file = path.is_file()
    except OSError:  # too long to be the name of anything
        is_file = False
    if not is_file:
        raise UserError(f"there is no file '{source}'.", "Name an image file, or a data URL that begins with data:.")
    return _thumbnail(path, f"'{source}'")


def _thumbnail(file: Path | io.BytesIO, what: str) -> str:
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            return data_url(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        raise UserError(f"{what} is no image that can be read ({error}).", "Choose a PNG, JPEG or WEBP.") from error


def data_url(image: Image.Image) -> str:
    """Return the middle of an image, `SIDE` pixels wide and high, as the data URL of a JPEG."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return jpeg_url(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), _QUALITY)


def jpeg_url(image: Image.Image, quality: int) -> str:
    """Return an image as the data URL of a JPEG."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _decoded(url: str) -> bytes:
    head, comma, text = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the data URL cannot be read ({error}).", "Name an image file instead.") from error
