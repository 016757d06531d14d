"""The `.npz` of latents beside each picture: the seed's format, and what it was made from."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.config.errors import UserError
from library.config.output_files import replacing
from library.data.buckets import PIXELS_PER_LATENT_CELL, Size, covering_size, legacy_crop_ltrb, true_crop_ltrb

LATENT_CHANNELS = 4


class Crop(NamedTuple):
    """Where the training picture lies in the resized one: left and top, and left when the picture is mirrored."""

    left: float
    top: float
    left_flipped: float


@dataclass(frozen=True)
class CachedLatents:
    """What one cache file holds; arrays float32.

    `latents` and `latents_flipped` are (4, h, w), not yet scaled, `alpha_mask` (H, W) from 0 to 1. `crop_ltrb` is in
    pixels of the resized picture. The last three are this project's own: `resized_size`, absent where the crop is the
    legacy one, and the fingerprints of the picture's file and of the VAE.
    """

    latents: np.ndarray
    original_size: Size
    crop_ltrb: tuple[float, float, float, float]
    latents_flipped: np.ndarray | None = None
    alpha_mask: np.ndarray | None = None
    resized_size: Size | None = None
    image_digest: str | None = None
    vae_digest: str | None = None

    @property
    def bucket(self) -> Size:
        """The size in pixels at which the picture was encoded."""
        _, height, width = self.latents.shape
        return Size(width * PIXELS_PER_LATENT_CELL, height * PIXELS_PER_LATENT_CELL)

    @property
    def is_ours(self) -> bool:
        """Whether this project wrote the file, as against one of kohya's family."""
        return self.image_digest is not None

    def crop(self, *, legacy: bool) -> Crop:
        """The crop to train with: as recorded by us, and for other programs' files the true one unless `legacy`.

        The trainers of kohya's family record the offset of a letterbox on the axis that is not cropped.
        """
        left, top, right, _ = self.crop_ltrb
        if self.resized_size is not None:
            return Crop(left, top, self.resized_size.width - right)
        if legacy or self.is_ours:
            return Crop(left, top, self.bucket.width - right)
        resized = covering_size(self.bucket, self.original_size)
        left, top, right, _ = true_crop_ltrb(self.bucket, resized)
        return Crop(left, top, resized.width - right)

    def reasons_stale(self, *, image_digest: str | None, vae_digest: str, bucket: Size, flip: bool) -> list[str]:
        """Why the file does not fit what it would be made from today; empty if it does.

        What the file does not say (another program's) and a picture that is gone (`image_digest` None) count as fit.
        """
        reasons = []
        if self.image_digest is not None and image_digest not in (None, self.image_digest):
            reasons.append("the picture has changed")
        if self.vae_digest is not None and vae_digest != self.vae_digest:
            reasons.append("it was made with another VAE")
        if self.bucket != bucket:
            reasons.append(f"it is for {self.bucket}, not {bucket}")
        if flip and self.latents_flipped is None:
            reasons.append("it lacks the mirrored latents (--flip_aug)")
        return reasons


def crop_to_record(bucket: Size, resized: Size, image_size: Size, *, legacy: bool) -> tuple[float, float, float, float]:
    """Left, top, right, bottom for a new cache file: the true crop, or what the seed would have recorded."""
    return legacy_crop_ltrb(bucket, image_size) if legacy else true_crop_ltrb(bucket, resized)


def cache_path(image: Path) -> Path:
    """The cache file of a picture: beside it, same stem."""
    return image.with_suffix(".npz")


def file_digest(path: Path) -> str:
    """A fingerprint of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_cache(path: Path, cached: CachedLatents) -> None:
    """Write a cache file, whole or not at all; raises `UserError` where `path` cannot be written."""
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
    with replacing(path) as file:
        # The stubs have no room for the arrays of savez between its keyword arguments.
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_cache(path: Path) -> CachedLatents:
    """What a cache file holds, ours or the seed's.

    Raises `UserError` naming the file for damage, missing keys, wrong shapes, and latents that are NaN or Inf.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return _from_arrays({name: file[name] for name in file.files})
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"'{path}' is not a usable latent cache ({error}).", "Delete it and run prepare_buckets_latents.py again."
        ) from error


def _from_arrays(arrays: dict[str, np.ndarray]) -> CachedLatents:
    latents = _checked_latents(arrays["latents"])
    flipped = _checked_latents(arrays["latents_flipped"]) if "latents_flipped" in arrays else None
    if flipped is not None and flipped.shape != latents.shape:
        raise ValueError(f"latents_flipped is {flipped.shape}, latents {latents.shape}")
    left, top, right, bottom = (float(value) for value in arrays["crop_ltrb"])
    resized = arrays.get("resized_size")
    return CachedLatents(
        latents=latents,
        original_size=_size(arrays["original_size"]),
        crop_ltrb=(left, top, right, bottom),
        latents_flipped=flipped,
        alpha_mask=arrays.get("alpha_mask"),
        resized_size=None if resized is None else _size(resized),
        image_digest=str(arrays["image_blake2b"]) if "image_blake2b" in arrays else None,
        vae_digest=str(arrays["vae_blake2b"]) if "vae_blake2b" in arrays else None,
    )


def _checked_latents(latents: np.ndarray) -> np.ndarray:
    if latents.ndim != 3 or latents.shape[0] != LATENT_CHANNELS or latents.dtype.kind != "f":
        raise ValueError(f"latents are {latents.dtype} {latents.shape}, expected float32 (4, h, w)")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold NaN or Inf")
    return latents.astype(np.float32, copy=False)


def _size(values: np.ndarray) -> Size:
    width, height = (int(value) for value in values)
    return Size(width, height)
