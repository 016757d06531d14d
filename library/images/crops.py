"""Which part of a resized image is trained on: the true centre crop, and the one that kohya's trainers record."""

from typing import NamedTuple

from library.sdxl.sizes import Size

LEGACY_CROP_NOTICE = (
    "--legacy_crop_coords: the model receives a letterbox offset as crop, on the axis that is not cropped, unlike in"
    " SDXL's own training and in diffusers. Use it only to continue a model that was trained this way."
)


class Crop(NamedTuple):
    """Position of the trained part in the resized image: left, top, and left of the flipped image."""

    left: float
    top: float
    left_flipped: float


def true_crop_ltrb(bucket: Size, resized: Size) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the centre crop to `bucket`, in pixels of the resized image."""
    left = (resized.width - bucket.width) // 2
    top = (resized.height - bucket.height) // 2
    return left, top, left + bucket.width, top + bucket.height


def legacy_crop_ltrb(bucket: Size, image_size: Size) -> tuple[float, float, float, float]:
    """Return the left, top, right, bottom that the 2023 trainer records: the whole image fitted into the bucket.

    This is a letterbox offset on the axis that is not cropped. It is kept to continue models trained this way.
    """
    width: float = bucket.width
    height: float = bucket.height
    if bucket.aspect > image_size.aspect:
        width = bucket.height * image_size.aspect
    else:
        height = bucket.width / image_size.aspect
    left = (bucket.width - width) // 2
    top = (bucket.height - height) // 2
    return left, top, left + width, top + height


def crop_to_record(bucket: Size, resized: Size, image_size: Size, *, legacy: bool) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom for a new cache file: the true crop, or the legacy one if `legacy`."""
    return legacy_crop_ltrb(bucket, image_size) if legacy else true_crop_ltrb(bucket, resized)


def crop_to_train(bucket: Size, resized: Size, image_size: Size, *, legacy: bool) -> Crop:
    """Return the crop to condition on for an image resized to `resized`; a legacy crop is in pixels of the bucket."""
    left, top, right, _ = crop_to_record(bucket, resized, image_size, legacy=legacy)
    width = bucket.width if legacy else resized.width
    return Crop(left, top, width - right)
