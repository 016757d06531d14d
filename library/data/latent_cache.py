"""The `.npz` of latents beside each image: the format of the 2023 trainer, and what it was made from."""

import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.config.atomic_files import replacing
from library.config.digests import digest, file_digest
from library.config.errors import UserError
from library.data.buckets import covering_size
from library.data.crops import Crop, crop_to_train
from library.sdxl.sizes import LATENT_CHANNELS, MAX_SIDE, PIXELS_PER_LATENT, Size

log = logging.getLogger(__name__)

_BYTES_AROUND = 3000  # names, sizes, digests
_SMALL = 10_000
_LARGEST_LATENTS = LATENT_CHANNELS * (MAX_SIDE // PIXELS_PER_LATENT) ** 2 * 8 + _SMALL
_LARGEST_MEMBERS = {
    "latents": _LARGEST_LATENTS,
    "latents_flipped": _LARGEST_LATENTS,
    "alpha_mask": MAX_SIDE**2 * 8 + _SMALL,
    **dict.fromkeys(("original_size", "crop_ltrb", "resized_size"), _SMALL),
    **dict.fromkeys(("image_blake2b", "vae_blake2b", "resize_interpolation"), _SMALL),
}
"""The arrays of a cache file, and the bytes that each may have."""
_LARGE_STRANGER = 100_000_000

# What NumPy and zipfile raise for damaged files, depending on the byte that is damaged.
_READING_ERRORS = (
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


@dataclass(frozen=True)
class CacheDemands:
    """What a cache file must agree with to be used, besides its image and its bucket.

    `legacy_crop` None accepts either kind of crop. `only_ours` refuses the files of other programs, which do not say
    what they were made from. Without `check_image` the image is not read.
    """

    vae_digest: str
    flip: bool = False
    alpha_mask: bool = False
    legacy_crop: bool | None = None
    only_ours: bool = False
    check_image: bool = True
    resize_interpolation: str | None = None


@dataclass(frozen=True)
class CachedLatents:
    """The content of a cache file; arrays are float32.

    `latents` and `latents_flipped` are (4, h, w), not yet scaled, `alpha_mask` is (H, W) from 0 to 1. `crop_ltrb` is in
    pixels of the resized image. Only this project writes the last four: `resized_size`, absent if the crop is the
    legacy one, the digests of the image file and of the VAE, and the interpolation if it was not the usual one.
    """

    latents: np.ndarray
    original_size: Size
    crop_ltrb: tuple[float, float, float, float]
    latents_flipped: np.ndarray | None = None
    alpha_mask: np.ndarray | None = None
    resized_size: Size | None = None
    image_digest: str | None = None
    vae_digest: str | None = None
    resize_interpolation: str | None = None

    @property
    def bucket(self) -> Size:
        """The size in pixels at which the image was encoded."""
        _, height, width = self.latents.shape
        return Size(width * PIXELS_PER_LATENT, height * PIXELS_PER_LATENT)

    @property
    def is_ours(self) -> bool:
        """Whether this project wrote the file, not one of kohya's trainers."""
        return self.image_digest is not None

    @property
    def content_digest(self) -> str:
        """A digest of the image file, or of the latents where the cache does not name its image."""
        return self.image_digest or digest([self.latents.tobytes()]).hex()

    def in_direction(self, *, flipped: bool) -> np.ndarray:
        """Return the latents (4, h, w) of the image, or of the flipped one, which must be there."""
        if not flipped:
            return self.latents
        if self.latents_flipped is None:  # `CacheDemands.flip` has seen to it, but the file may be another by now
            raise UserError("the flipped latents are gone (--flip_aug).", "Prepare the latents with --flip_aug again.")
        return self.latents_flipped

    def crop(self, *, legacy: bool) -> Crop:
        """Return the crop to condition on: the legacy one if `legacy` or recorded on request, else the true one.

        Kohya's trainers record a letterbox offset on the axis that is not cropped.
        """
        if self.resized_size is None and (legacy or self.is_ours):
            left, top, right, _ = self.crop_ltrb
            return Crop(left, top, self.bucket.width - right)
        resized = self.resized_size or covering_size(self.bucket, self.original_size)
        return crop_to_train(self.bucket, resized, self.original_size, legacy=legacy)

    def reasons_stale(self, demands: CacheDemands, *, image_digest: str | None, bucket: Size) -> list[str]:
        """Return why the file does not fit what it would be made from today; empty if it fits.

        What the file of another program does not say, and an image that is not checked (`image_digest` None), count
        as fitting.
        """
        found = {
            "it does not say what it was made from": demands.only_ours and not self.is_ours,
            "the image has changed": self.is_ours and image_digest not in (None, self.image_digest),
            "it was made with another VAE": self.vae_digest not in (None, demands.vae_digest),
            f"it is for {self.bucket}, not {bucket}": self.bucket != bucket,
            f"the image was resized by {self.resize_interpolation or 'the usual interpolation'}, not by "
            f"{demands.resize_interpolation or 'the usual one'} (--resize_interpolation)": self.is_ours
            and self.resize_interpolation != demands.resize_interpolation,
            "it lacks the flipped latents (--flip_aug)": demands.flip and self.latents_flipped is None,
            "it lacks the alpha mask (--alpha_mask)": demands.alpha_mask and self.alpha_mask is None,
            "it has the other kind of crop (--legacy_crop_coords)": demands.legacy_crop
            not in (None, self.resized_size is None),
        }
        return [reason for reason, holds in found.items() if holds]


def cache_bytes(bucket: Size, *, flip: bool = False, alpha_mask: bool = False) -> int:
    """Return the size in bytes of the cache file of an image in `bucket`, within a few thousand bytes."""
    num_pixels = bucket.width * bucket.height
    num_numbers = LATENT_CHANNELS * num_pixels // PIXELS_PER_LATENT**2 * (1 + flip) + num_pixels * alpha_mask
    return num_numbers * np.dtype(np.float32).itemsize + _BYTES_AROUND


def cache_path(image: Path, bucket: Size | None = None) -> Path:
    """Return the cache file of an image: beside it, with the same stem, and `bucket` if its name tells it."""
    return image.with_suffix(".npz") if bucket is None else image.with_name(f"{image.stem}_{bucket}.npz")


def write_cache(path: Path, cached: CachedLatents) -> None:
    """Write a cache file, whole or not at all; raise `UserError` where `path` cannot be written."""
    arrays: dict[str, np.ndarray] = {
        "latents": cached.latents.astype(np.float32),
        "original_size": np.array(cached.original_size, dtype=np.int64),
        "crop_ltrb": np.array(cached.crop_ltrb, dtype=np.float64),
    }
    if cached.latents_flipped is not None:
        arrays["latents_flipped"] = cached.latents_flipped.astype(np.float32)
    if cached.alpha_mask is not None:
        arrays["alpha_mask"] = cached.alpha_mask.astype(np.float32)
    if cached.resized_size is not None:
        arrays["resized_size"] = np.array(cached.resized_size, dtype=np.int64)
    if cached.image_digest is not None:
        arrays["image_blake2b"] = np.array(cached.image_digest)
    if cached.vae_digest is not None:
        arrays["vae_blake2b"] = np.array(cached.vae_digest)
    if cached.resize_interpolation is not None:
        arrays["resize_interpolation"] = np.array(cached.resize_interpolation)
    with replacing(path) as file:
        # The stubs have no room for the arrays of savez between its keyword arguments.
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_cache(path: Path, *, warns: bool = False) -> CachedLatents:
    """Return the content of a cache file, ours or that of another program.

    Raise `UserError` naming the file for damage, missing keys, wrong shapes, and latents that are NaN or Inf.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if warns:
                _warn_of_strangers(path, file)
            return _from_arrays(_known_arrays(file))
    except _READING_ERRORS as error:
        raise UserError(
            f"'{path}' is not a usable latent cache ({error}).", "Delete it and run prepare_buckets_latents.py again."
        ) from error


def bucket_of_cache(path: Path) -> Size:
    """Return the size that a cache file was made for; reads no latents. Raise `UserError` as `read_cache`."""
    try:
        with np.load(path, allow_pickle=False) as file, file.zip.open("latents.npy") as member:
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(member)]
            shape, _, _ = read_header(member)
            _, height, width = shape
            return Size(width * PIXELS_PER_LATENT, height * PIXELS_PER_LATENT)
    except _READING_ERRORS as error:
        raise UserError(
            f"'{path}' is not a usable latent cache ({error}).", "Delete it and run prepare_buckets_latents.py again."
        ) from error


def read_fitting_cache(path: Path, image: Path | None, bucket: Size | None, demands: CacheDemands) -> CachedLatents:
    """Return the content of the cache file of `image` if it fits; an `image` or `bucket` of None is not compared.

    Raise `UserError` naming the file for damage, as `read_cache`, and with every reason why it does not fit.
    """
    cached = read_cache(path, warns=True)
    image_digest = None
    if image is not None and demands.check_image and cached.is_ours:
        image_digest = file_digest(image)
    reasons = cached.reasons_stale(demands, image_digest=image_digest, bucket=bucket or cached.bucket)
    if reasons:
        raise UserError(
            f"'{path}' does not fit: {' and '.join(reasons)}.",
            "Run prepare_buckets_latents.py again where the images are.",
        )
    return cached


def _known_arrays(file: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a cache file that are read, each of a size that it can have."""
    arrays = {}
    for name in _LARGEST_MEMBERS.keys() & set(file.files):
        num_bytes = file.zip.getinfo(f"{name}.npy").file_size  # what it says before it is unpacked
        if num_bytes > _LARGEST_MEMBERS[name]:
            raise ValueError(f"{name} would take {num_bytes} bytes")
        arrays[name] = file[name]
    return arrays


def _warn_of_strangers(path: Path, file: Any) -> None:
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.zip.infolist()}
    for name in sizes.keys() - _LARGEST_MEMBERS.keys():
        if sizes[name] > _LARGE_STRANGER:
            log.warning("'%s' holds '%s' of %d MB, which is not read.", path, name, sizes[name] // 10**6)


def _from_arrays(arrays: dict[str, np.ndarray]) -> CachedLatents:
    missing = {"latents", "original_size", "crop_ltrb"} - arrays.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    latents = _checked_latents(arrays["latents"])
    flipped = _checked_latents(arrays["latents_flipped"]) if "latents_flipped" in arrays else None
    if flipped is not None and flipped.shape != latents.shape:
        raise ValueError(f"latents_flipped is {flipped.shape}, latents {latents.shape}")
    left, top, right, bottom = (float(value) for value in arrays["crop_ltrb"])
    if not np.isfinite([left, top, right, bottom]).all():
        raise ValueError("crop_ltrb holds NaN or Inf")
    resized = arrays.get("resized_size")
    return CachedLatents(
        latents=latents,
        original_size=_size(arrays["original_size"]),
        crop_ltrb=(left, top, right, bottom),
        latents_flipped=flipped,
        alpha_mask=_checked_mask(arrays["alpha_mask"]) if "alpha_mask" in arrays else None,
        resized_size=None if resized is None else _size(resized),
        image_digest=str(arrays["image_blake2b"]) if "image_blake2b" in arrays else None,
        vae_digest=str(arrays["vae_blake2b"]) if "vae_blake2b" in arrays else None,
        resize_interpolation=str(arrays["resize_interpolation"]) if "resize_interpolation" in arrays else None,
    )


def _checked_latents(latents: np.ndarray) -> np.ndarray:
    if latents.ndim != 3 or latents.shape[0] != LATENT_CHANNELS or latents.size == 0 or latents.dtype.kind != "f":
        raise ValueError(f"latents are {latents.dtype} {latents.shape}, expected float32 (4, h, w)")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold NaN or Inf")
    with np.errstate(over="ignore"):
        narrowed = latents.astype(np.float32, copy=False)
    if not np.isfinite(narrowed).all():
        raise ValueError("latents hold numbers that float32 cannot")
    return narrowed


def _checked_mask(mask: np.ndarray) -> np.ndarray:
    if mask.ndim != 2 or mask.dtype.kind != "f" or not np.isfinite(mask).all():
        raise ValueError(f"alpha_mask is {mask.dtype} {mask.shape}, expected numbers of float32 (H, W)")
    return mask


def _size(values: np.ndarray) -> Size:
    width, height = (int(value) for value in values)
    if min(width, height) < 1:
        raise ValueError(f"{width}x{height} is no size")
    return Size(width, height)
