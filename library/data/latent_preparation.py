"""Images to latents before training: loaded ahead by threads, encoded bucket by bucket."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from library.config.atomic_files import require_disk_space
from library.config.digests import file_digest
from library.config.errors import UserError
from library.data.found_images import error_of_images
from library.data.latent_cache import CachedLatents, cache_bytes, cache_path
from library.data.latent_index import index_path
from library.data.latent_writing import IndexedFiles, Place
from library.data.prefetch import prefetch
from library.data.subsets import Subset
from library.data.training_columns import NONE, TrainingSet
from library.data.training_images import KeptLatents, TrainingImage
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketedImage
from library.images.crops import crop_to_record
from library.images.masks import black_mask, load_masked, mask_digest
from library.sdxl.latents import encode_pixels_finite, vae_digest
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

Named = TypeVar("Named")
_MOST_THREADS = 4  # unless asked for more


@dataclass(frozen=True)
class Encoding:
    """How images are encoded, and what is kept beside their latents.

    `num_threads` threads read images ahead; None uses up to four.
    """

    batch_size: int = 1
    flip: bool = False
    legacy_crop: bool = False
    num_threads: int | None = None


class Outcome(NamedTuple):
    """The latents of an image, or the error that says why there are none."""

    image: BucketedImage
    cached: CachedLatents | None
    error: UserError | None = None
    redone_in_float32: bool = False


class _Loaded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray | None  # float32 (h, w)
    digest: str
    mask_digest: str | None


def pixels_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Convert uint8 (H, W, 3) to float32 [3, H, W] in -1..1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


def require_disk_for_latents(folder: Path, images: Iterable[BucketedImage], encoding: Encoding) -> None:
    """Raise `UserError` unless the disk of `folder` has room for the latents of `images`."""
    sizes = [
        cache_bytes(image.assignment.bucket, flip=encoding.flip, masked=image.mask is not None) for image in images
    ]
    require_disk_space(folder, sum(sizes), f"to write latents of {len(sizes)} images")


def encode_missing(
    images: Iterable[TrainingImage], vae: AutoencoderKL, options: TrainingSetOptions, *, digest: str | None = None
) -> TrainingSet:
    """Return the images with latents, in memory or on disk as the options ask, unless their pixels change.

    `digest` is the VAE's, to record in the caches (None: computed from the weights as they are held). Raises
    `UserError` naming the images that cannot be encoded.
    """
    training_set = TrainingSet.of(images)
    rows = np.flatnonzero(training_set.columns["where"] == NONE).tolist()
    lacking = {row: image for row in rows if not (image := training_set[row]).subset.augmentation.changes_pixels}
    if not lacking:
        return training_set
    source_of = _sources_of(lacking.values(), on_disk=options.cache_latents_to_disk)
    subset_of = {source_of[image.source]: image.subset for image in lacking.values() if image.source is not None}
    flip = any(image.subset.augmentation.flip_aug for image in lacking.values())
    encoding = Encoding(options.vae_batch_size, flip=flip, legacy_crop=options.legacy_crop_coords)
    keep: Callable[[BucketedImage, CachedLatents], KeptLatents] = _in_memory
    files: IndexedFiles | None = None
    if options.cache_latents_to_disk:
        for folder in {subset.image_dir for subset in subset_of.values()}:
            of_folder = [source for source, subset in subset_of.items() if subset.image_dir == folder]
            require_disk_for_latents(folder, of_folder, encoding)
        files = IndexedFiles({source: _place_of(source, subset) for source, subset in subset_of.items()})
        keep = files.write
    encoded: dict[BucketedImage, KeptLatents] = {}
    errors: list[UserError] = []
    try:
        outcomes = encode_images(list(subset_of), vae, encoding, vae_digest=digest or vae_digest(vae))
        for outcome in tqdm(
            outcomes, "encoding latents", len(subset_of), unit="image", disable=None if subset_of else True
        ):
            if outcome.cached is None:
                assert outcome.error is not None
                errors.append(outcome.error)
                continue
            if outcome.redone_in_float32:
                log.warning("'%s': NaN in the VAE's precision, encoded in float32.", outcome.image.path)
            encoded[outcome.image] = keep(outcome.image, outcome.cached)
    finally:
        if files is not None:
            files.save_index()
    if errors:
        raise error_of_images(errors)
    return training_set.with_latents(
        {row: encoded[source_of[image.source]] for row, image in lacking.items() if image.source is not None}
    )


def _sources_of(images: Iterable[TrainingImage], *, on_disk: bool) -> dict[BucketedImage, BucketedImage]:
    """Return what each source is encoded as: on disk, sources that differ in their mask alone share a file.

    The one with the mask serves both. Raise `UserError` for two masks.
    """
    sources = [image.source for image in images if image.source is not None]
    joined: dict[BucketedImage, BucketedImage] = {}
    for source in sources if on_disk else []:
        plain = source._replace(mask=None)
        joined[plain] = joined_masks(joined.get(plain, source), source)
    return {source: joined.get(source._replace(mask=None), source) for source in sources}


def joined_masks(first: BucketedImage, second: BucketedImage) -> BucketedImage:
    """Return the image with the mask of either. Raise `UserError` for two masks."""
    if None not in (first.mask, second.mask) and first.mask != second.mask:
        raise UserError(
            f"'{first.path}' has two masks, '{first.mask}' and '{second.mask}', and one file for its latents.",
            "Let the subsets agree in alpha_mask and conditioning_data_dir, or copy the folder.",
        )
    return first if second.mask is None else second


def _place_of(source: BucketedImage, subset: Subset) -> Place:
    file = cache_path(source.path, source.assignment.bucket if subset.names_bucket else None)
    return Place(file, index_path(subset), subset.image_dir)


def _in_memory(image: BucketedImage, cached: CachedLatents) -> KeptLatents:
    return KeptLatents(cached, cached.content_digest, cached.mask_digest)


def encode_images(
    images: Sequence[BucketedImage], vae: AutoencoderKL, encoding: Encoding, *, vae_digest: str
) -> Iterator[Outcome]:
    """Yield the latents of every image, bucket by bucket, encoded in the precision in which the VAE is held.

    Threads load images while the VAE works, and the VAE works in a thread while the caller handles what has come out.
    `vae_digest` is recorded in the caches. An image that cannot be read, or whose latents are NaN or Inf even in
    float32, comes out with its error, and the others continue. Raise `UserError` where the device has no memory for a
    single image.
    """
    return prefetch(_outcomes(images, vae, encoding, vae_digest), encoding.batch_size)


def _outcomes(
    images: Sequence[BucketedImage], vae: AutoencoderKL, encoding: Encoding, vae_digest: str
) -> Iterator[Outcome]:
    num_threads = encoding.num_threads or min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        batches = batches_of(images, lambda image: image.assignment.bucket, encoding.batch_size)
        for batch, loading in _loaded_ahead(pool, batches, num_threads):
            yield from _encode_batch(batch, loading, vae, encoding, vae_digest)


def batches_of(images: Iterable[Named], bucket_of: Callable[[Named], Size], batch_size: int) -> Iterator[list[Named]]:
    """Yield the images, or what stands for them, in the batches in which they are encoded: bucket by bucket."""
    buckets: dict[Size, list[Named]] = {}
    for image in images:
        buckets.setdefault(bucket_of(image), []).append(image)
    for same_size in buckets.values():
        for first in range(0, len(same_size), batch_size):
            yield same_size[first : first + batch_size]


def _loaded_ahead(
    pool: ThreadPoolExecutor, batches: Iterator[list[BucketedImage]], num_ahead: int
) -> Iterator[tuple[list[BucketedImage], list[Future[_Loaded]]]]:
    """Yield each batch with its images being loaded, `num_ahead` batches before they are asked for."""
    waiting: deque[tuple[list[BucketedImage], list[Future[_Loaded]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(_load, image) for image in batch]))
        if len(waiting) > num_ahead:
            yield waiting.popleft()
    yield from waiting


def _load(image: BucketedImage) -> _Loaded:
    pixels, mask = load_masked(image, image.assignment.resized)
    if image.mask is not None and mask is not None and not mask.any():
        raise black_mask(image.mask, image.path)
    return _Loaded(pixels, mask, file_digest(image.path), mask_digest(image.mask))


def _encode_batch(
    batch: list[BucketedImage],
    loading: list[Future[_Loaded]],
    vae: AutoencoderKL,
    encoding: Encoding,
    vae_digest: str,
) -> Iterator[Outcome]:
    usable: list[tuple[BucketedImage, _Loaded]] = []
    for image, future in zip(batch, loading, strict=True):
        try:
            usable.append((image, future.result()))
        except UserError as error:
            yield Outcome(image, None, error)
    if not usable:
        return
    pixels = torch.stack([pixels_to_tensor(loaded.pixels) for _, loaded in usable])
    with _explained_out_of_memory(batch[0].assignment.bucket):
        plain = encode_pixels_finite(vae, pixels)
        flipped = encode_pixels_finite(vae, pixels.flip(-1)) if encoding.flip else None
    encoded = [plain] if flipped is None else [plain, flipped]
    for index, (image, loaded) in enumerate(usable):
        if any(index in each.failed for each in encoded):
            yield Outcome(image, None, _not_finite(image.path))
            continue
        bucket, resized, _ = image.assignment
        cached = CachedLatents(
            latents=plain.latents[index].cpu().numpy(),
            original_size=image.size,
            crop_ltrb=crop_to_record(bucket, resized, image.size, legacy=encoding.legacy_crop),
            latents_flipped=None if flipped is None else flipped.latents[index].cpu().numpy(),
            alpha_mask=loaded.mask,
            resized_size=None if encoding.legacy_crop else resized,
            image_digest=loaded.digest,
            vae_digest=vae_digest,
            resize_interpolation=image.resize_interpolation,
            mask_digest=loaded.mask_digest,
        )
        yield Outcome(image, cached, redone_in_float32=any(index in each.redone for each in encoded))


@contextmanager
def _explained_out_of_memory(bucket: Size) -> Iterator[None]:
    """Within the block, raise a `UserError` where the GPU has no memory for a single image of `bucket`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory encoding an image of {bucket} ({str(error).partition('.')[0]}).",
            "Close what else uses the GPU, or prepare smaller images with prepare_buckets_latents.py, which also takes "
            "--mixed_precision=bf16 and, to keep the latents written so far, --skip_existing.",
        ) from error


def _not_finite(path: Path) -> UserError:
    return UserError(
        f"'{path}': the VAE's output is NaN or Inf, in float32 too.",
        "Check the image. If it is sound, the VAE's file is damaged: use another model.",
    )
