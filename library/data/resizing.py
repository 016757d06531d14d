"""An image to the size of its bucket: resized to cover it, cropped to its centre."""

import math

import numpy as np
from PIL import Image

from library.data.crops import true_crop_ltrb
from library.sdxl.sizes import Size

LARGE_PIXELS = 1 << 26
"""Above this many pixels, what the crop takes away is cut off before the rest is resized.

Below it the whole image is resized, as in the reference: cutting first changes some numbers by a rounding.
"""

_LANCZOS_REACH = 3  # source pixels on each side that a new one depends on, where the image grows

_Box = tuple[int, int, int, int]


def resize_and_crop(image: Image.Image, resized: Size, bucket: Size) -> np.ndarray:
    """Return the centre of the image: resized to `resized`, cropped to `bucket`; uint8 (H, W, 3), (H, W) for a mask.

    As in the reference, shrinking averages areas (each pixel counts by the part of it that is covered) and enlarging
    uses Lanczos. The crop is `true_crop_ltrb`.
    """
    crop = true_crop_ltrb(bucket, resized)
    if resized.width <= image.width and resized.height <= image.height:
        return _shrunk(image, resized, crop)
    if resized.area <= LARGE_PIXELS:
        return np.array(image.resize(resized, Image.Resampling.LANCZOS).crop(crop))
    return _enlarged_part(image, resized, crop)


def _shrunk(image: Image.Image, resized: Size, crop: _Box) -> np.ndarray:
    left, top, right, bottom = crop
    across, down = image.width / resized.width, image.height / resized.height
    source = (0, 0, image.width, image.height)
    if image.width * image.height > LARGE_PIXELS:
        source = _covering_pixels(image, (left * across, top * down, right * across, bottom * down), reach=(0, 0))
        image = image.crop(source)
    rows = _average_rows(np.asarray(image), down, range(top, bottom), source[1])
    columns = _average_rows(rows.swapaxes(0, 1), across, range(left, right), source[0])
    return np.ascontiguousarray((columns.swapaxes(0, 1) + 0.5).astype(np.uint8))


def _average_rows(pixels: np.ndarray, scale: float, kept: range, first: int) -> np.ndarray:
    """Rows `kept` of an image shrunk to 1 / `scale`, float32: means of the rows (H, W, ...) that each one covers.

    `pixels` are the rows from number `first` on. Pillow's BOX filter does not serve: it counts a row wholly or not at
    all, so that an image a little larger than its bucket would lose whole rows instead of being averaged.
    """
    averaged = np.empty((len(kept), *pixels.shape[1:]), dtype=np.float32)
    for row, source_row in enumerate(kept):
        start, end = source_row * scale, (source_row + 1) * scale
        covered = np.arange(int(start), min(math.ceil(end), first + len(pixels)))
        weights = np.minimum(covered + 1, end) - np.maximum(covered, start)
        weights = (weights / weights.sum()).astype(np.float32)
        averaged[row] = np.tensordot(
            weights, pixels[covered[0] - first : covered[-1] + 1 - first].astype(np.float32), axes=1
        )
    return averaged


def _enlarged_part(image: Image.Image, resized: Size, crop: _Box) -> np.ndarray:
    """The crop of the enlarged image without the rest of it, which may be too large for any memory."""
    across, down = image.width / resized.width, image.height / resized.height
    wanted = (crop[0] * across, crop[1] * down, crop[2] * across, crop[3] * down)
    reach = (math.ceil(_LANCZOS_REACH * max(1, across)), math.ceil(_LANCZOS_REACH * max(1, down)))
    # Pillow takes a box in float32: in pixels of a part it is exact where in pixels of a long image it would not be.
    source = _covering_pixels(image, wanted, reach)
    box = (
        wanted[0] - source[0],
        wanted[1] - source[1],
        min(wanted[2], image.width) - source[0],
        min(wanted[3], image.height) - source[1],
    )
    size = (crop[2] - crop[0], crop[3] - crop[1])
    return np.array(image.crop(source).resize(size, Image.Resampling.LANCZOS, box=box))


def _covering_pixels(image: Image.Image, wanted: tuple[float, float, float, float], reach: tuple[int, int]) -> _Box:
    """The whole pixels of the image that `wanted` (left, top, right, bottom) touches, and `reach` more around them."""
    left, top, right, bottom = wanted
    return (
        max(0, math.floor(left) - reach[0]),
        max(0, math.floor(top) - reach[1]),
        min(image.width, math.ceil(right) + reach[0]),
        min(image.height, math.ceil(bottom) + reach[1]),
    )
