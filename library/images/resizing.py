"""An image to the size of its bucket: resized to cover it, cropped to its centre or to another part."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from library.images.crops import true_crop_ltrb
from library.sdxl.sizes import Size

LARGE_PIXELS = 1 << 26
"""Above this many pixels, what the crop takes away is cut off before the rest is resized.

Below it the whole image is resized, as in the reference: cutting first changes some numbers by a rounding.
"""

_LANCZOS_REACH = 3  # source pixels on each side that a new one depends on, where the image grows
_WEIGHED_REACH = 2  # the same for the other interpolations, at any scale, beside the pixels that are covered

_Box = tuple[int, int, int, int]

_Weighing = Callable[[int, float, int], tuple[int, np.ndarray]]
"""From the number of a new row, the rows of the image for each new one and its number of rows, to the first row that
the new one depends on and the weights of the rows from there on."""


def resize_and_crop(
    image: Image.Image,
    resized: Size,
    bucket: Size,
    *,
    corner: tuple[int, int] | None = None,
    interpolation: str | None = None,
) -> np.ndarray:
    """Return a part of the image: resized to `resized`, cropped to `bucket`; uint8 (H, W, 3), (H, W) for a mask.

    The part is the centre (`true_crop_ltrb`), or the one whose left and top are `corner`. As in the reference,
    shrinking averages areas (each pixel counts by the part of it that is covered) and enlarging uses Lanczos, unless
    `interpolation` names another way: `area`, `bilinear`, `bicubic` and `nearest` are OpenCV's, so that the two in the
    middle alias where they shrink by more than two; `lanczos` and `box` are Pillow's.
    """
    crop = true_crop_ltrb(bucket, resized) if corner is None else _box_at(corner, bucket)
    if interpolation is None:
        interpolation = "area" if resized.width <= image.width and resized.height <= image.height else "lanczos"
    if interpolation in _WEIGHINGS:
        return _weighed(image, resized, crop, _WEIGHINGS[interpolation])
    assert interpolation == "lanczos"
    if resized.area <= LARGE_PIXELS:
        return np.array(image.resize(resized, Image.Resampling.LANCZOS).crop(crop))
    return _lanczos_part(image, resized, crop)


def _box_at(corner: tuple[int, int], bucket: Size) -> _Box:
    left, top = corner
    return left, top, left + bucket.width, top + bucket.height


def _weighed(image: Image.Image, resized: Size, crop: _Box, weighing: _Weighing) -> np.ndarray:
    """The crop of the resized image, each of whose pixels is a weighed sum of those around it."""
    left, top, right, bottom = crop
    across, down = image.width / resized.width, image.height / resized.height
    width, height = image.size
    source = (0, 0, width, height)
    if width * height > LARGE_PIXELS:
        wanted = (left * across, top * down, right * across, bottom * down)
        reach = 0 if weighing is _area else _WEIGHED_REACH
        source = _covering_pixels(image, wanted, reach=(reach, reach))
        image = image.crop(source)
    rows = _sums_of_rows(np.asarray(image), source[1], [weighing(row, down, height) for row in range(top, bottom)])
    columns = _sums_of_rows(
        rows.swapaxes(0, 1), source[0], [weighing(column, across, width) for column in range(left, right)]
    )
    return np.ascontiguousarray((columns.swapaxes(0, 1) + 0.5).clip(0, 255).astype(np.uint8))


def _sums_of_rows(pixels: np.ndarray, first: int, weighed: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """One row for each of `weighed`, float32; `pixels` (H, W, ...) are the rows of the image from `first` on."""
    sums = np.empty((len(weighed), *pixels.shape[1:]), dtype=np.float32)
    for row, (start, weights) in enumerate(weighed):
        covered = pixels[start - first : start - first + len(weights)].astype(np.float32)
        sums[row] = np.tensordot(weights.astype(np.float32), covered, axes=1)
    return sums


def _area(row: int, scale: float, num_rows: int) -> tuple[int, np.ndarray]:
    """The mean of the rows that the new one covers, each counting by its covered part."""
    start, end = row * scale, (row + 1) * scale
    covered = np.arange(int(start), min(math.ceil(end), num_rows))
    weights = np.minimum(covered + 1, end) - np.maximum(covered, start)
    return int(covered[0]), weights / weights.sum()


def _box(row: int, scale: float, num_rows: int) -> tuple[int, np.ndarray]:
    """The mean of the rows that the new one covers, each counting wholly or not at all."""
    centre, half = (row + 0.5) * scale, max(1.0, scale) / 2
    near = np.arange(max(0, int(centre - half + 0.5)), min(num_rows, int(centre + half + 0.5)))
    rows = near[(near + 0.5 - centre > -half) & (near + 0.5 - centre <= half)]
    return int(rows[0]), np.full(len(rows), 1 / len(rows))


def _nearest(row: int, scale: float, num_rows: int) -> tuple[int, np.ndarray]:
    """The row in which the centre of the new one lies."""
    return min(int((row + 0.5) * scale), num_rows - 1), np.ones(1)


def _bilinear(row: int, scale: float, num_rows: int) -> tuple[int, np.ndarray]:
    """A straight line between the two rows around the centre of the new one."""
    below, fraction = _place(row, scale)
    return _kept_inside(below, np.array([1 - fraction, fraction]), num_rows)


def _bicubic(row: int, scale: float, num_rows: int) -> tuple[int, np.ndarray]:
    """A cubic between the four rows around the centre of the new one (Keys 1981, a = -0.75 as OpenCV has it)."""
    below, fraction = _place(row, scale)
    a, near, far = -0.75, np.array([fraction, 1 - fraction]), np.array([fraction + 1, 2 - fraction])
    inner = ((a + 2) * near - (a + 3)) * near**2 + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    return _kept_inside(below - 1, np.array([outer[0], *inner, outer[1]]), num_rows)


def _place(row: int, scale: float) -> tuple[int, float]:
    """The last row of the image whose centre is not below that of the new row, and how far below it that lies."""
    centre = (row + 0.5) * scale - 0.5
    return math.floor(centre), centre - math.floor(centre)


def _kept_inside(first: int, weights: np.ndarray, num_rows: int) -> tuple[int, np.ndarray]:
    """The weights of rows from `first` on; those of rows outside the image go to its first or last row."""
    rows = np.arange(first, first + len(weights)).clip(0, num_rows - 1)
    kept = np.zeros(rows[-1] - rows[0] + 1)
    np.add.at(kept, rows - rows[0], weights)
    return int(rows[0]), kept


_WEIGHINGS: dict[str, _Weighing] = {
    "area": _area,
    "box": _box,
    "nearest": _nearest,
    "bilinear": _bilinear,
    "bicubic": _bicubic,
}


def _lanczos_part(image: Image.Image, resized: Size, crop: _Box) -> np.ndarray:
    """The crop of the resized image without the rest of it, which may be too large for any memory."""
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
