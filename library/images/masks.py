"""The part of an image that counts in the loss: its mask, from a file or its alpha channel, at the size of latents."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from library.config.digests import file_digest
from library.images.buckets import ALPHA, BucketedImage, MaskSource
from library.images.reading import UnusableImage, load_cropped, read_size
from library.sdxl.sizes import PIXELS_PER_LATENT, Size

_OPAQUE = 255
_REMEDY = "Paint white what is to be trained, remove the image, or train it without a mask."


class MaskedPixels(NamedTuple):
    """An image at the size of its bucket: uint8 (H, W, 3), and the mask of its latents, float32 (h, w), if it has one.

    A mask is 0 where nothing is trained and 1 where the loss counts in full.
    """

    pixels: np.ndarray
    mask: np.ndarray | None


def load_masked(source: BucketedImage, resized: Size, corner: tuple[int, int] | None = None) -> MaskedPixels:
    """Return the part of an image at `corner` (None: the centre) of its size `resized`, and that part of its mask.

    The mask is resized by the interpolation of the image, then averaged over the area of each latent cell. Raise
    `UnusableImage` for an image or mask that cannot be read, and for a mask of another size than its image.
    """
    bucket = source.assignment.bucket
    fitted = partial(
        load_cropped, resized=resized, bucket=bucket, corner=corner, interpolation=source.resize_interpolation
    )
    image = fitted(source.path)
    if source.mask is None:
        return MaskedPixels(image.pixels, None)
    if source.mask == ALPHA:
        opacity = image.alpha
    else:
        require_size(source.mask, source.size)
        opacity = fitted(source.mask, is_mask=True).pixels
    if opacity is None:
        opacity = np.full((bucket.height, bucket.width), _OPAQUE, dtype=np.uint8)
    return MaskedPixels(image.pixels, mask_of_cells(opacity.astype(np.float32) / _OPAQUE))


def mask_of_cells(mask: np.ndarray) -> np.ndarray:
    """Return the mask (h, w) of the latents of a mask (H, W) in pixels."""
    height, width = (side // PIXELS_PER_LATENT for side in mask.shape)
    return area_mean(torch.from_numpy(mask)[None], height, width)[0].numpy()


def area_mean(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return masks [B, H, W] or [B, 1, H, W] at another size, each value the mean of the pixels that it covers.

    Those at a border count in full for both sides, as in kohya's masked loss.
    """
    return adaptive_avg_pool2d(mask, (height, width))


def mask_digest(mask: MaskSource | None) -> str | None:
    """Return the digest of the file of a mask; None if it has none: an alpha channel belongs to its image."""
    return file_digest(mask) if isinstance(mask, Path) else None


def require_size(mask: Path, expected: Size) -> None:
    """Raise `UnusableImage` for a mask that is not as large as its image."""
    found = read_size(mask)
    if found != expected:
        raise UnusableImage(
            f"'{mask}' cannot be used: the mask is {found}, its image {expected}.", "Save it at the size of the image."
        )


def black_mask(mask: MaskSource, image: Path) -> UnusableImage:
    """Return the error for a mask that leaves nothing of its image."""
    what = f"its mask '{mask}' is black" if isinstance(mask, Path) else "it is transparent"
    return UnusableImage(f"'{image}' cannot be used: {what} wherever it would be trained.", _REMEDY)
