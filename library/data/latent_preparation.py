"""Pictures to latents before training: loaded ahead by threads, encoded bucket by bucket."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from library.config.errors import UserError
from library.data.buckets import BucketAssignment, Size
from library.data.images import load_rgb_and_alpha, resize_and_crop
from library.data.latent_cache import CachedLatents, crop_to_record, file_digest
from library.sdxl.latents import encode_pixels_finite, vae_digest


class Picture(NamedTuple):
    """A picture to encode: its file, its size on disk and the bucket it goes to."""

    path: Path
    size: Size
    assignment: BucketAssignment


class Outcome(NamedTuple):
    """What became of a picture: its latents, or the error that says why there are none."""

    picture: Picture
    cached: CachedLatents | None
    error: UserError | None = None
    redone_in_float32: bool = False


@dataclass(frozen=True)
class PreparationSettings:
    """How pictures are encoded."""

    batch_size: int = 1
    num_threads: int | None = None
    flip: bool = False
    alpha_mask: bool = False
    legacy_crop: bool = False


class _Loaded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3)
    alpha: np.ndarray | None  # uint8 (H, W)
    digest: str


def pixels_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) to float32 [3, H, W] in -1..1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


def encode_pictures(
    pictures: Sequence[Picture], vae: AutoencoderKL, settings: PreparationSettings
) -> Iterator[Outcome]:
    """The latents of every picture, in the order of their buckets.

    Pictures are read by threads while the VAE works. One that cannot be read, or whose latents are NaN or Inf even in
    float32, comes out with its error; the others go on.
    """
    digest = vae_digest(vae)
    num_threads = settings.num_threads or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        for batch, loading in _loaded_ahead(pool, _batches(pictures, settings.batch_size), num_threads):
            yield from _encode_batch(batch, loading, vae, digest, settings)


def _batches(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    buckets: dict[Size, list[Picture]] = {}
    for picture in pictures:
        buckets.setdefault(picture.assignment.bucket, []).append(picture)
    for same_size in buckets.values():
        for first in range(0, len(same_size), batch_size):
            yield same_size[first : first + batch_size]


def _loaded_ahead(
    pool: ThreadPoolExecutor, batches: Iterator[list[Picture]], num_ahead: int
) -> Iterator[tuple[list[Picture], list[Future[_Loaded]]]]:
    """Each batch with its pictures on their way, `num_ahead` batches before they are asked for."""
    waiting: deque[tuple[list[Picture], list[Future[_Loaded]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(_load, picture) for picture in batch]))
        if len(waiting) > num_ahead:
            yield waiting.popleft()
    yield from waiting


def _load(picture: Picture) -> _Loaded:
    image, alpha = load_rgb_and_alpha(picture.path)
    bucket, resized, _ = picture.assignment
    return _Loaded(
        resize_and_crop(image, resized, bucket),
        None if alpha is None else resize_and_crop(alpha, resized, bucket),
        file_digest(picture.path),
    )


def _encode_batch(
    batch: list[Picture],
    loading: list[Future[_Loaded]],
    vae: AutoencoderKL,
    digest: str,
    settings: PreparationSettings,
) -> Iterator[Outcome]:
    usable: list[tuple[Picture, _Loaded]] = []
    for picture, future in zip(batch, loading, strict=True):
        try:
            usable.append((picture, future.result()))
        except UserError as error:
            yield Outcome(picture, None, error)
    if not usable:
        return
    pixels = torch.stack([pixels_to_tensor(loaded.pixels) for _, loaded in usable])
    plain = encode_pixels_finite(vae, pixels)
    mirrored = encode_pixels_finite(vae, pixels.flip(-1)) if settings.flip else None
    for index, (picture, loaded) in enumerate(usable):
        if index in plain.failed or (mirrored is not None and index in mirrored.failed):
            yield Outcome(picture, None, _not_finite(picture.path))
            continue
        cached = CachedLatents(
            latents=plain.latents[index].cpu().numpy(),
            latents_flipped=None if mirrored is None else mirrored.latents[index].cpu().numpy(),
            original_size=picture.size,
            crop_ltrb=crop_to_record(
                picture.assignment.bucket, picture.assignment.resized, picture.size, legacy=settings.legacy_crop
            ),
            alpha_mask=_mask(loaded) if settings.alpha_mask else None,
            resized_size=None if settings.legacy_crop else picture.assignment.resized,
            image_digest=loaded.digest,
            vae_digest=digest,
        )
        redone = index in plain.redone or (mirrored is not None and index in mirrored.redone)
        yield Outcome(picture, cached, redone_in_float32=redone)


def _mask(loaded: _Loaded) -> np.ndarray:
    """Opacity 0-1 (H, W); a picture without alpha is opaque."""
    if loaded.alpha is None:
        return np.ones(loaded.pixels.shape[:2], dtype=np.float32)
    return loaded.alpha.astype(np.float32) / 255.0


def _not_finite(path: Path) -> UserError:
    return UserError(
        f"'{path}' gives NaN or Inf in the VAE, in float32 too.",
        "Look at the picture; if it is sound, the VAE's file is damaged: give another model.",
    )
