"""The size each image is trained at: buckets of about equal area, so that batches are full and nothing is distorted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple

from library.config.errors import UserError
from library.config.options import option
from library.sdxl.sizes import MAX_ASPECT, MAX_SIDE, MIN_SIDE, PIXELS_PER_LATENT, Size

_MOST_DIGITS = 5  # of a side of the resolution

ALPHA: Final = "alpha"
MaskSource = Path | Literal["alpha"]
"""Where the mask of an image is: in a file, or in its alpha channel."""


class BucketAssignment(NamedTuple):
    """How an image is fitted: resized to `resized`, which covers `bucket`, and cropped to `bucket`.

    `aspect_error` is the aspect of the bucket minus that of the image: above 0, the crop removes rows.
    """

    bucket: Size
    resized: Size
    aspect_error: float


class BucketedImage(NamedTuple):
    """An image file, its size on disk, the bucket it goes to, how it is resized (None: as is usual), and its mask."""

    path: Path
    size: Size
    assignment: BucketAssignment
    resize_interpolation: str | None = None
    mask: MaskSource | None = None


@dataclass(frozen=True)
class BucketRule:
    """The rule that assigns each image a bucket; it matches the 2023 trainer in every recorded case.

    A side is counted in steps of `bucket_reso_steps` pixels, and a bucket has as many steps of area as the resolution
    allows. 1024x1024 in steps of 64 is 16 x 16 = 256 steps of area. A bucket 1216 wide is 19 steps wide, and
    256 // 19 = 13 steps high: this is where 1216x832 comes from. Each width from `min_bucket_reso` to
    `max_bucket_reso` makes one such bucket and its portrait counterpart; the square is always among them.

    The minimum holds for the side that is counted up, not for the side that follows from it (1024..2048 makes 512x2048
    too), whereas the maximum holds for both. An image goes to the bucket of nearest aspect, to the narrower one of two
    that are equally near.

    With `no_upscale` there is no list, and the two limits have no effect: each image keeps its size, or is shrunk to
    the area of the resolution, and is cropped to whole steps. If not `enabled`, the resolution is the only bucket.
    Raise `UserError` for limits that contradict each other.
    """

    max_resolution: Size
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    no_upscale: bool
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.enabled:
            self._check_steps()
        else:
            _require_latent_cells("both sides of the resolution", *self.max_resolution)
        if self.enabled and not self.no_upscale:
            self._check_limits()

    def sizes(self) -> list[Size]:
        """Return all buckets, narrowest first; none with `no_upscale`, where each image determines its bucket."""
        if not self.enabled:
            return [self.max_resolution]
        if self.no_upscale:
            return []
        return list(_sizes_of_equal_area(self))

    def assign(self, image_size: Size) -> BucketAssignment:
        """Return the bucket of an image of `image_size` and the size it is resized to before the crop.

        Raise `UserError` if `no_upscale` leaves less than one step of a side, and for an image too long for any bucket.
        """
        short, long = sorted(image_size)
        if long > MAX_ASPECT * short:
            raise UserError(
                f"an image of {image_size} is more than {MAX_ASPECT} times as long as wide.", "Crop or remove it."
            )
        if self.enabled and self.no_upscale:
            return self._assign_without_upscaling(image_size)
        sizes = self.sizes()
        bucket = image_size if image_size in sizes else min(sizes, key=_aspect_distance(image_size))
        return BucketAssignment(bucket, covering_size(bucket, image_size), bucket.aspect - image_size.aspect)

    def _assign_without_upscaling(self, image_size: Size) -> BucketAssignment:
        candidates = [(self._whole_steps(*resized), resized) for resized in self._not_larger(image_size)]
        usable = [(bucket, resized) for bucket, resized in candidates if bucket.area > 0]
        if not usable:
            raise UserError(
                f"an image of {image_size} is too small or too narrow for a bucket:"
                f" one side would be under {self.bucket_reso_steps} pixels.",
                "Remove the image, omit --bucket_no_upscale, or lower --bucket_reso_steps.",
            )
        distance = _aspect_distance(image_size)
        bucket, resized = min(usable, key=lambda candidate: distance(candidate[0]))
        return BucketAssignment(bucket, resized, bucket.aspect - image_size.aspect)

    def _not_larger(self, image_size: Size) -> list[Size]:
        """Return the size itself, or both ways to shrink it to the area: height in whole steps, or width."""
        if image_size.area <= self.max_resolution.area:
            return [image_size]
        aspect = image_size.aspect
        ideal_width = math.sqrt(self.max_resolution.area * aspect)
        ideal_height = self.max_resolution.area / ideal_width
        width, height = self._whole_steps(_rounded(ideal_width), _rounded(ideal_height))
        return [Size(_rounded(height * aspect), height), Size(width, _rounded(width / aspect))]

    def _whole_steps(self, width: int, height: int) -> Size:
        return Size(width - width % self.bucket_reso_steps, height - height % self.bucket_reso_steps)

    def _check_steps(self) -> None:
        _require_latent_cells("bucket_reso_steps", self.bucket_reso_steps)
        if self.bucket_reso_steps > min(self.max_resolution):
            fitting = min(64, min(self.max_resolution) // PIXELS_PER_LATENT * PIXELS_PER_LATENT)
            raise UserError(
                f"bucket_reso_steps ({self.bucket_reso_steps}) exceeds a side of the resolution {self.max_resolution}.",
                f"Set --bucket_reso_steps={fitting}." if fitting else "Raise the resolution.",
            )

    def _check_limits(self) -> None:
        _require_latent_cells("min_bucket_reso and max_bucket_reso", self.min_bucket_reso, self.max_bucket_reso)
        if self.min_bucket_reso < self.bucket_reso_steps:
            raise UserError(
                f"min_bucket_reso ({self.min_bucket_reso}) is below bucket_reso_steps ({self.bucket_reso_steps}).",
                f"Set --min_bucket_reso={self.bucket_reso_steps}, or more.",
            )
        if self.min_bucket_reso > max(self.max_resolution):
            raise UserError(
                f"min_bucket_reso ({self.min_bucket_reso}) is above the resolution {self.max_resolution}.",
                f"Set --min_bucket_reso={self._in_steps(max(self.max_resolution) // 2)}, or raise the resolution.",
            )
        largest = max(self.min_bucket_reso, *self.max_resolution)
        if self.max_bucket_reso < largest:
            raise UserError(
                f"max_bucket_reso ({self.max_bucket_reso}) is below min_bucket_reso ({self.min_bucket_reso})"
                f" or a side of the resolution {self.max_resolution}.",
                f"Set --max_bucket_reso={min(MAX_SIDE, 2 * largest // PIXELS_PER_LATENT * PIXELS_PER_LATENT)}, which "
                "leaves room for wide and tall images.",
            )

    def _in_steps(self, side: int) -> int:
        return max(self.bucket_reso_steps, side - side % self.bucket_reso_steps)


@dataclass(frozen=True)
class BucketOptions:
    """The limits of the buckets."""

    _argument_group_name: ClassVar[str] = "Buckets"

    min_bucket_reso: int = option(
        256, "Smallest side from which buckets are counted up, in pixels.", least=MIN_SIDE, most=MAX_SIDE
    )
    max_bucket_reso: int = option(1024, "Largest side of a bucket, in pixels.", least=MIN_SIDE, most=MAX_SIDE)
    bucket_reso_steps: int = option(
        64, "Step between the sides of buckets, in pixels. A multiple of 8.", least=MIN_SIDE, most=MAX_SIDE
    )
    bucket_no_upscale: bool = option(False, "Never enlarge an image: derive its bucket from its own size.")

    def rule(self, max_resolution: Size, *, enabled: bool = True) -> BucketRule:
        """Return the rule within these limits; raise `UserError` where they contradict each other."""
        return BucketRule(
            max_resolution,
            self.min_bucket_reso,
            self.max_bucket_reso,
            self.bucket_reso_steps,
            self.bucket_no_upscale,
            enabled,
        )


def parse_resolution(text: str) -> Size:
    """Return the size of "1024" (a square), "1216,832" or "1216x832" (width, height); raise `UserError` for others."""
    sides = text.lower().replace("x", ",").split(",")
    numbers = [int(side) for side in sides if side.strip().isdecimal() and len(side.strip()) <= _MOST_DIGITS]
    if len(sides) > 2 or len(numbers) != len(sides) or not Size(numbers[0], numbers[-1]).is_trainable:
        raise UserError(
            f"'{text}' is not a resolution.",
            "Give one number for a square, or width,height: 1024 or 1216,832;"
            f" a side has {MIN_SIDE} to {MAX_SIDE} pixels.",
        )
    return Size(numbers[0], numbers[-1])


@cache
def _sizes_of_equal_area(rule: BucketRule) -> tuple[Size, ...]:
    step = rule.bucket_reso_steps
    area_steps = (rule.max_resolution.width // step) * (rule.max_resolution.height // step)
    square = math.isqrt(area_steps) * step
    sizes = {Size(square, square)}
    for side in range(rule.min_bucket_reso, rule.max_bucket_reso + 1, step):
        other_side = min(rule.max_bucket_reso, area_steps // (side // step) * step)
        if other_side > 0:
            sizes |= {Size(side, other_side), Size(other_side, side)}
    return tuple(sorted(sizes))


def covering_size(bucket: Size, image_size: Size) -> Size:
    """Return the smallest size of the image's aspect that covers the bucket."""
    scale = max(bucket.width / image_size.width, bucket.height / image_size.height)
    return Size(_rounded(image_size.width * scale), _rounded(image_size.height * scale))


def _aspect_distance(image_size: Size) -> Callable[[Size], float]:
    return lambda bucket: abs(bucket.aspect - image_size.aspect)


def _rounded(pixels: float) -> int:
    """Round half a pixel up, as the 2023 trainer does; `round` would choose the even neighbour."""
    return int(pixels + 0.5)


def _require_latent_cells(what: str, *pixels: int) -> None:
    if any(side <= 0 or side % PIXELS_PER_LATENT for side in pixels):
        raise UserError(
            f"{what} must be positive multiples of {PIXELS_PER_LATENT} pixels,"
            f" one cell of the latents: got {', '.join(map(str, pixels))}."
        )
