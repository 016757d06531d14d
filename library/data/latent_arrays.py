"""The arrays of a cache file of latents: their limits, and the checks of each."""

import zipfile
import zlib

import numpy as np

from library.images.masks import mask_of_cells
from library.sdxl.sizes import LATENT_CHANNELS, MAX_SIDE, PIXELS_PER_LATENT, Size

_SMALL = 10_000
_LARGEST_LATENTS = LATENT_CHANNELS * (MAX_SIDE // PIXELS_PER_LATENT) ** 2 * 8 + _SMALL
LARGEST_MEMBERS = {
    "latents": _LARGEST_LATENTS,
    "latents_flipped": _LARGEST_LATENTS,
    "alpha_mask": MAX_SIDE**2 * 8 + _SMALL,
    **dict.fromkeys(("original_size", "crop_ltrb", "resized_size"), _SMALL),
    **dict.fromkeys(("image_blake2b", "vae_blake2b", "mask_blake2b", "resize_interpolation"), _SMALL),
}
"""The arrays of a cache file, and the bytes that each may have."""

READING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    EOFError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise for damaged files, depending on the byte that is damaged."""


def checked_latents(latents: np.ndarray) -> np.ndarray:
    """Return latents in float32. Raise `ValueError` unless they are finite and of their shape."""
    if latents.ndim != 3 or latents.shape[0] != LATENT_CHANNELS or latents.size == 0 or latents.dtype.kind != "f":
        raise ValueError(f"latents are {latents.dtype} {latents.shape}, expected float32 (4, h, w)")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold NaN or Inf")
    with np.errstate(over="ignore"):
        narrowed = latents.astype(np.float32, copy=False)
    if not np.isfinite(narrowed).all():
        raise ValueError("latents hold numbers that float32 cannot")
    return narrowed


def checked_mask(mask: np.ndarray, latents_shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask (h, w) in float32. Raise `ValueError` for other shapes, or numbers that no mask has.

    Other programs store it in pixels, as this one did at first.
    """
    _, height, width = latents_shape
    in_pixels = (height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)
    if mask.shape not in ((height, width), in_pixels) or mask.dtype.kind != "f":
        raise ValueError(f"alpha_mask is {mask.dtype} {mask.shape}, expected float32 {(height, width)} or {in_pixels}")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("alpha_mask holds other numbers than those from 0 to 1")
    narrowed = mask.astype(np.float32, copy=False)
    return mask_of_cells(narrowed) if mask.shape == in_pixels else narrowed


def checked_size(values: np.ndarray) -> Size:
    """Return two numbers as a size. Raise `ValueError` for others."""
    width, height = (int(value) for value in values)
    if min(width, height) < 1:
        raise ValueError(f"{width}x{height} is no size")
    return Size(width, height)
