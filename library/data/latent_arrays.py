"""The arrays of a cache file of latents: read within limits, and each checked."""

import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from library.data.masks import mask_of_cells
from library.sdxl.sizes import LATENT_CHANNELS, MAX_SIDE, PIXELS_PER_LATENT, Size

log = logging.getLogger(__name__)

_SMALL = 10_000
_LARGEST_LATENTS = LATENT_CHANNELS * (MAX_SIDE // PIXELS_PER_LATENT) ** 2 * 8 + _SMALL
_LARGEST_MEMBERS = {
    "latents": _LARGEST_LATENTS,
    "latents_flipped": _LARGEST_LATENTS,
    "alpha_mask": MAX_SIDE**2 * 8 + _SMALL,
    **dict.fromkeys(("original_size", "crop_ltrb", "resized_size"), _SMALL),
    **dict.fromkeys(("image_blake2b", "vae_blake2b", "mask_blake2b", "resize_interpolation"), _SMALL),
}
"""The arrays of a cache file, and the bytes that each may have."""
_LARGE_STRANGER = 100_000_000

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


def known_arrays(file: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a cache file that are read, each of a size that it can have."""
    arrays = {}
    for name in _LARGEST_MEMBERS.keys() & set(file.files):
        num_bytes = file.zip.getinfo(f"{name}.npy").file_size  # what it says before it is unpacked
        if num_bytes > _LARGEST_MEMBERS[name]:
            raise ValueError(f"{name} would take {num_bytes} bytes")
        arrays[name] = file[name]
    return arrays


def warn_of_strangers(path: Path, file: Any) -> None:
    """Warn of large arrays in a cache file that are not read."""
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.zip.infolist()}
    for name in sizes.keys() - _LARGEST_MEMBERS.keys():
        if sizes[name] > _LARGE_STRANGER:
            log.warning("'%s' holds '%s' of %d MB, which is not read.", path, name, sizes[name] // 10**6)


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
