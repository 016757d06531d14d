"""Pictures to latents before training: loaded ahead by threads, encoded bucket by bucket."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from library.config.atomic_files import require_disk_space
from library.config.errors import UserError
from library.config.options import option
from library.data.buckets import BucketAssignment
from library.data.images import load_rgb_and_alpha, resize_and_crop
from library.data.latent_cache import CachedLatents, cache_bytes, crop_to_record, file_digest
from library.data.prefetch import read_ahead
from library.sdxl.latents import encode_pixels_finite
from library.sdxl.sizes import Size


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
class EncodingOptions:
    """How pictures are encoded."""

    _argument_group_name: ClassVar[str] = "Latents"

    batch_size: int = option(1, "Pictures that are encoded at once.")
    max_data_loader_n_workers: int | None = option(None, "Threads that read pictures ahead; up to four if not given.")
    mixed_precision: str = option("no", "Precision in which the VAE runs.", choices=("no", "fp16", "bf16"))
    flip_aug: bool = option(False, "Encode each picture mirrored too, for --flip_aug in training.")
    alpha_mask: bool = option(False, "Keep the transparency of each picture beside its latents.")
    legacy_crop_coords: bool = option(False, "Record the crop as kohya's trainers do, on the wrong axis.")

    @property
    def vae_dtype(self) -> torch.dtype:
        """The precision in which the VAE runs."""
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]

    @property
    def num_threads(self) -> int:
        """Threads that read pictures; 0 asks for none ahead, and one is the least that reads at all."""
        if self.max_data_loader_n_workers is None:
            return min(4, os.cpu_count() or 1)
        return max(1, self.max_data_loader_n_workers)

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.batch_size < 1:
            yield f"--batch_size is {self.batch_size}; it must be 1 or more."
        if self.max_data_loader_n_workers is not None and self.max_data_loader_n_workers < 0:
            yield f"--max_data_loader_n_workers is {self.max_data_loader_n_workers}; it must be 0 or more."


class _Loaded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3)
    alpha: np.ndarray | None  # uint8 (H, W)
    digest: str


def pixels_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) to float32 [3, H, W] in -1..1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


def require_room(folder: Path, pictures: Iterable[Picture], options: EncodingOptions) -> None:
    """Raise `UserError` unless the disk of `folder` holds the latents of `pictures`."""
    sizes = [
        cache_bytes(picture.assignment.bucket, flip=options.flip_aug, alpha_mask=options.alpha_mask)
        for picture in pictures
    ]
    require_disk_space(folder, sum(sizes), f"latents of {len(sizes)} pictures")


def encode_pictures(
    pictures: Sequence[Picture], vae: AutoencoderKL, options: EncodingOptions, *, vae_digest: str
) -> Iterator[Outcome]:
    """The latents of every picture, in the order of their buckets.

    Pictures are read by threads while the VAE works, in the precision it is held in; and the VAE works in a thread
    while the caller is busy with what has come out. `vae_digest` is what the caches say it is. A picture that cannot be
    read, or whose latents are NaN or Inf even in float32, comes out with its error; the others go on. Raises
    `UserError` where the device has no memory for a single picture.
    """
    return read_ahead(_outcomes(pictures, vae, options, vae_digest), options.batch_size)


def _outcomes(
    pictures: Sequence[Picture], vae: AutoencoderKL, options: EncodingOptions, vae_digest: str
) -> Iterator[Outcome]:
    with ThreadPoolExecutor(options.num_threads) as pool:
        for batch, loading in _loaded_ahead(pool, _batches(pictures, options.batch_size), options.num_threads):
            yield from _encode_batch(batch, loading, vae, options, vae_digest)


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
    options: EncodingOptions,
    vae_digest: str,
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
    with _explained_out_of_memory(batch[0].assignment.bucket):
        plain = encode_pixels_finite(vae, pixels)
        mirrored = encode_pixels_finite(vae, pixels.flip(-1)) if options.flip_aug else None
    encoded = [plain] if mirrored is None else [plain, mirrored]
    for index, (picture, loaded) in enumerate(usable):
        if any(index in each.failed for each in encoded):
            yield Outcome(picture, None, _not_finite(picture.path))
            continue
        bucket, resized, _ = picture.assignment
        cached = CachedLatents(
            latents=plain.latents[index].cpu().numpy(),
            original_size=picture.size,
            crop_ltrb=crop_to_record(bucket, resized, picture.size, legacy=options.legacy_crop_coords),
            latents_flipped=None if mirrored is None else mirrored.latents[index].cpu().numpy(),
            alpha_mask=_mask(loaded) if options.alpha_mask else None,
            resized_size=None if options.legacy_crop_coords else resized,
            image_digest=loaded.digest,
            vae_digest=vae_digest,
        )
        yield Outcome(picture, cached, redone_in_float32=any(index in each.redone for each in encoded))


@contextmanager
def _explained_out_of_memory(bucket: Size) -> Iterator[None]:
    """Within the block, a GPU without memory for a single picture of `bucket` is a `UserError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has no memory left to encode a picture of {bucket} ({str(error).partition('.')[0]}).",
            "Close what else uses the GPU, or prepare smaller pictures with prepare_buckets_latents.py: it takes "
            "--mixed_precision=bf16 too and, to keep the latents written so far, --skip_existing.",
        ) from error


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
