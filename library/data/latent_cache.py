"""The `.npz` of latents beside each image: the format of the 2023 trainer, and what it was made from."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.config.atomic_files import replacing
from library.config.digests import digest, file_digest
from library.config.errors import UserError
from library.data.file_states import state_from
from library.data.latent_arrays import (
    LARGEST_MEMBERS,
    READING_ERRORS,
    checked_latents,
    checked_mask,
    checked_size,
)
from library.data.latent_index import PLACE
from library.data.stored_arrays import StoredArrays, block_checksum, read_arrays
from library.images.buckets import ALPHA, MaskSource, covering_size
from library.images.crops import Crop, crop_to_train
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

_BYTES_AROUND = 3000  # names, sizes, digests


@dataclass(frozen=True)
class CacheDemands:
    """What a cache file must agree with to be used, besides its image and its bucket.

    `legacy_crop` None accepts either kind of crop. `only_ours` refuses the files of other programs, which do not say
    what they were made from. Without `check_image` neither the image nor the file of its mask is read.
    """

    vae_digest: str
    flip: bool = False
    mask: MaskSource | None = None
    legacy_crop: bool | None = None
    only_ours: bool = False
    check_image: bool = True
    resize_interpolation: str | None = None


@dataclass(frozen=True)
class CachedLatents:
    """The content of a cache file; arrays are float32.

    `latents` and `latents_flipped` are (4, h, w), not yet scaled, `alpha_mask` is (h, w) from 0 to 1 and weighs the
    loss. `crop_ltrb` is in pixels of the resized image. Only this project writes the last five: `resized_size`, absent
    if the crop is the legacy one, the digests of the image file, of the VAE and of the file of the mask (None if it is
    the alpha channel), and the interpolation if it was not the usual one.
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
    mask_digest: str | None = None

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
            "it has the other kind of crop (--legacy_crop_coords)": demands.legacy_crop
            not in (None, self.resized_size is None),
        }
        return [reason for reason, holds in found.items() if holds] + self._reasons_of_mask(demands)

    def _reasons_of_mask(self, demands: CacheDemands) -> list[str]:
        """Return why the mask is not the one that is demanded."""
        if demands.mask is None:
            return []
        if self.alpha_mask is None:
            return [f"it lacks the mask ({'--alpha_mask' if demands.mask == ALPHA else '--conditioning_data_dir'})"]
        if demands.mask == ALPHA:
            return [] if self.mask_digest is None else ["its mask is that of a file, not its alpha channel"]
        if self.mask_digest is None:
            return [f"its mask is its alpha channel, not '{demands.mask}'"]
        changed = demands.check_image and file_digest(demands.mask) != self.mask_digest
        return [f"the mask '{demands.mask}' has changed"] if changed else []


def cache_bytes(bucket: Size, *, flip: bool = False, masked: bool = False) -> int:
    """Return the size in bytes of the cache file of an image in `bucket`, within a few thousand bytes."""
    num_numbers = bucket.area // PIXELS_PER_LATENT**2 * (LATENT_CHANNELS * (1 + flip) + masked)
    return num_numbers * np.dtype(np.float32).itemsize + _BYTES_AROUND


def cache_path(image: Path, bucket: Size | None = None) -> Path:
    """Return the cache file of an image: beside it, with the same stem, and `bucket` if its name tells it."""
    return image.with_suffix(".npz") if bucket is None else image.with_name(f"{image.stem}_{bucket}.npz")


def write_cache(path: Path, cached: CachedLatents) -> np.ndarray:
    """Write a cache file, whole or not at all, and return where in it the numbers lie, as `read_with_place` does.

    Raise `UserError` where `path` cannot be written.
    """
    arrays: dict[str, np.ndarray] = {
        "latents": cached.latents.astype(np.float32),
        "original_size": np.array(cached.original_size, dtype=np.int64),
        "crop_ltrb": np.array(cached.crop_ltrb, dtype=np.float64),
    }
    if cached.latents_flipped is not None:
        arrays["latents_flipped"] = cached.latents_flipped.astype(np.float32)
    if cached.alpha_mask is not None:
        arrays["alpha_mask"] = cached.alpha_mask.astype(np.float32)
    if cached.mask_digest is not None:
        arrays["mask_blake2b"] = np.array(cached.mask_digest)
    if cached.resized_size is not None:
        arrays["resized_size"] = np.array(cached.resized_size, dtype=np.int64)
    if cached.image_digest is not None:
        arrays["image_blake2b"] = np.array(cached.image_digest)
    if cached.vae_digest is not None:
        arrays["vae_blake2b"] = np.array(cached.vae_digest)
    if cached.resize_interpolation is not None:
        arrays["resize_interpolation"] = np.array(cached.resize_interpolation)
    content = io.BytesIO()
    # The stubs have no room for the arrays of savez between its keyword arguments.
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with replacing(path) as file:
        file.write(content.getbuffer())
        file.flush()
        state = state_from(os.fstat(file.fileno()))  # renaming does not change it
    return _place_of(StoredArrays(content.getbuffer(), state), arrays)


def read_cache(path: Path) -> CachedLatents:
    """Return the content of a cache file, as `read_with_place` does."""
    return read_with_place(path)[0]


def read_with_place(path: Path, *, warns: bool = False) -> tuple[CachedLatents, np.ndarray | None]:
    """Return the content of a cache file, ours or that of another program, and where in it the numbers lie.

    The place is None if the file must be read whole.

    Raise `UserError` naming the file for damage, missing keys, wrong shapes, and latents that are NaN or Inf.
    """
    with _explained_damage(path):
        arrays, stored = read_arrays(path, LARGEST_MEMBERS, warns=warns)
        cached = _from_arrays(arrays)
        return cached, None if stored is None else _place_of(stored, arrays)


def cache_holds_mask(path: Path) -> bool:
    """Return whether a cache file has a mask; reads its table alone. Raise `UserError` as `read_cache`."""
    with _explained_damage(path), np.load(path, allow_pickle=False) as file:
        return "alpha_mask" in file.files


def bucket_of_cache(path: Path) -> Size:
    """Return the size that a cache file was made for; reads no latents. Raise `UserError` as `read_cache`."""
    with (
        _explained_damage(path),
        np.load(path, allow_pickle=False) as file,
        file.zip.open("latents.npy") as member,
    ):
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(member)]
        shape, _, _ = read_header(member)
        _, height, width = shape
        return Size(width * PIXELS_PER_LATENT, height * PIXELS_PER_LATENT)


@contextmanager
def _explained_damage(path: Path) -> Iterator[None]:
    """Within the block, which reads a cache file, raise a `UserError` that names it for what damage makes of it."""
    try:
        yield
    except READING_ERRORS as error:
        raise UserError(
            f"'{path}' is not a usable latent cache ({error}).", "Delete it and run prepare_buckets_latents.py again."
        ) from error


def _place_of(stored: StoredArrays, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return state, offsets and checksums of a file: of latents, flipped latents and mask; 0 for what is read whole."""
    place = np.zeros((), PLACE)
    place["state"] = stored.state
    shape = arrays["latents"].shape
    for number, (name, expected) in enumerate(
        {"latents": shape, "latents_flipped": shape, "alpha_mask": shape[1:]}.items()
    ):
        if name in stored.names:
            found = stored.place_of(name)
            if (found.dtype, found.shape) == ("<f4", expected):
                place["offsets"][number] = found.offset
                place["checksums"][number] = block_checksum(arrays[name])
    return place


def read_fitting(
    path: Path, image: Path | None, bucket: Size | None, demands: CacheDemands
) -> tuple[CachedLatents, np.ndarray | None]:
    """Return what `read_with_place` does if it fits; an `image` or `bucket` of None is not compared.

    Raise `UserError` naming the file for damage, as `read_cache`, and with every reason why it does not fit.
    """
    cached, place = read_with_place(path, warns=True)
    require_fitting(cached, f"'{path}'", image, bucket, demands)
    return cached, place


def require_fitting(
    cached: CachedLatents, name: str, image: Path | None, bucket: Size | None, demands: CacheDemands
) -> None:
    """Raise `UserError` with every reason why latents of that name do not fit."""
    checks = image is not None and demands.check_image and cached.is_ours
    image_digest = file_digest(image) if checks and image is not None else None
    reasons = cached.reasons_stale(demands, image_digest=image_digest, bucket=bucket or cached.bucket)
    if reasons:
        raise UserError(
            f"{name} does not fit: {' and '.join(reasons)}.",
            "Run prepare_buckets_latents.py again where the images are.",
        )


def _from_arrays(arrays: dict[str, np.ndarray]) -> CachedLatents:
    missing = {"latents", "original_size", "crop_ltrb"} - arrays.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    latents = checked_latents(arrays["latents"])
    flipped = checked_latents(arrays["latents_flipped"]) if "latents_flipped" in arrays else None
    if flipped is not None and flipped.shape != latents.shape:
        raise ValueError(f"latents_flipped is {flipped.shape}, latents {latents.shape}")
    left, top, right, bottom = (float(value) for value in arrays["crop_ltrb"])
    if not np.isfinite([left, top, right, bottom]).all():
        raise ValueError("crop_ltrb holds NaN or Inf")
    resized = arrays.get("resized_size")
    return CachedLatents(
        latents=latents,
        original_size=checked_size(arrays["original_size"]),
        crop_ltrb=(left, top, right, bottom),
        latents_flipped=flipped,
        alpha_mask=checked_mask(arrays["alpha_mask"], latents.shape) if "alpha_mask" in arrays else None,
        resized_size=None if resized is None else checked_size(resized),
        image_digest=str(arrays["image_blake2b"]) if "image_blake2b" in arrays else None,
        vae_digest=str(arrays["vae_blake2b"]) if "vae_blake2b" in arrays else None,
        resize_interpolation=str(arrays["resize_interpolation"]) if "resize_interpolation" in arrays else None,
        mask_digest=str(arrays["mask_blake2b"]) if "mask_blake2b" in arrays else None,
    )
