"""Metadata, images and caches to the list of images to train on."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from library.config.digests import digest, file_digest
from library.config.errors import UserError, listed
from library.config.magnitudes import MOST_VISITS
from library.data.augmentation import require_faces
from library.data.buckets import BucketAssignment, BucketedImage, covering_size
from library.data.cache_files import cache_finder
from library.data.caption_sources import warn_of_changed_captions
from library.data.captions import CaptionPair
from library.data.crops import LEGACY_CROP_NOTICE, Crop, crop_to_train
from library.data.folder_images import find_images_of_folder, in_bucket, with_distinct_keys
from library.data.found_images import FoundImage, error_of_images, notices, require_usable
from library.data.image_keys import images_by_stem, is_file, resolve_cache, resolve_image
from library.data.images import read_size
from library.data.latent_cache import (
    CacheDemands,
    CachedLatents,
    read_cache,
    read_fitting_cache,
)
from library.data.metadata import (
    Entry,
    captions_of,
    is_reg,
    loss_weight,
    read_metadata,
    require_captions,
    sentence_of_sources,
    train_resolution,
)
from library.data.subsets import Subset
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

_FINGERPRINT_BYTES = 8


class Kind(NamedTuple):
    """What the images of one batch share: data set, bucket, and whether their latents are cached."""

    dataset: int
    bucket: Size
    has_latents: bool


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image of the training set; `size` is its own, `bucket` the size it is trained at.

    `latents` are in memory or in the cache file that is named, and `content_digest` tells what they were made from.
    Without latents, `source` is encoded in each step.
    """

    key: str
    captions: CaptionPair
    subset: Subset
    size: Size
    bucket: Size
    crop: Crop
    latents: Path | CachedLatents | None = None
    content_digest: str | None = None
    source: BucketedImage | None = None
    loss_weight: float = 1.0

    @property
    def has_latents(self) -> bool:
        """Whether the latents are cached, in memory or on disk."""
        return self.latents is not None

    @property
    def kind(self) -> "Kind":
        """What the images of one batch share."""
        return Kind(self.subset.dataset, self.bucket, self.has_latents)

    def read_latents(self) -> CachedLatents:
        """Return the cached latents. Raise `UserError` if their file is no longer usable, or is another by now."""
        assert self.latents is not None
        if not isinstance(self.latents, Path):
            return self.latents
        cached = read_cache(self.latents)
        if cached.bucket != self.bucket or self.content_digest not in (None, cached.content_digest):
            other = "of another image" if cached.bucket == self.bucket else f"for {cached.bucket}, not {self.bucket}"
            raise UserError(
                f"'{self.latents}' was replaced while training: it holds latents {other}.",
                "Start again, or restore the latents and continue from a saved state.",
            )
        return cached

    def fingerprint(self) -> str:
        """Return a digest of captions, bucket, the image, and whether its latents are cached.

        The image file is read unless the latents are cached. Raise `UserError` if it cannot be read.
        """
        if self.source is not None and not self.has_latents:
            content, kind = file_digest(self.source.path), "pixels"
        else:
            assert self.content_digest is not None
            content, kind = self.content_digest, "latents"
        captions = ("\n".join(variants) for variants in self.captions)
        parts = (*captions, str(self.bucket), kind, content)
        encoded = [part.encode("utf-8", errors="surrogatepass") for part in parts]
        with_lengths = (half for part in encoded for half in (len(part).to_bytes(8, "little"), part))
        return digest(with_lengths, _FINGERPRINT_BYTES).hex()


def find_training_images(subsets: Sequence[Subset]) -> list[FoundImage]:
    """Return every image of the subsets with its files; reads the metadata, lists the folders and opens no network.

    Raise `UserError` naming the images of a subset that lack a caption, or else all that have neither a usable image
    file nor a usable cache, or no bucket; report what else the user should know.
    """
    is_alone = len(subsets) == 1
    found = [image for subset in subsets for image in _find_images_of(subset, is_alone=is_alone)]
    return found if is_alone else with_distinct_keys(found)


def _find_images_of(subset: Subset, *, is_alone: bool) -> list[FoundImage]:
    path, folder = subset.metadata_file, subset.image_dir
    if path is None:
        found = find_images_of_folder(subset)
        _require_countable(len(found), subset, folder)
        return found
    metadata = read_metadata(path)
    if not metadata:
        raise UserError(f"'{path}' has no images.", "Make it with the scripts of finetune/.")
    require_captions(metadata, path, one_caption=subset.one_caption)
    marked = [key for key, entry in metadata.items() if is_reg(entry)]
    if marked:
        raise UserError(
            f"'{path}': {len(marked)} images are marked as regularization images: {listed(marked)}.",
            "These are not offered yet; remove is_reg, or the images.",
        )
    sources = sentence_of_sources(metadata, one_caption=subset.one_caption)
    if sources is not None:
        log.info("%s", sources)
    _require_countable(len(metadata), subset, path)
    by_stem = images_by_stem(folder)
    find_cache = cache_finder()
    found = [_found(key, entry, subset, by_stem, find_cache) for key, entry in metadata.items()]
    require_usable(found, subset)
    for notice in notices(found, subset, by_stem, is_alone=is_alone):
        log.info("%s", notice)
    if not subset.one_caption:
        file_of = {image.key: image.file for image in found}
        warn_of_changed_captions(path, metadata, file_of, (subset.extension_l, subset.extension_g))
    return found


def _require_countable(num_images: int, subset: Subset, source: Path) -> None:
    num_visits = num_images * subset.num_repeats
    if num_visits > MOST_VISITS:
        raise UserError(
            f"{subset.num_repeats} repeats of the images of '{source}' make an epoch of {num_visits} images.",
            f"Lower --dataset_repeats: an epoch may have {MOST_VISITS}. --max_train_steps decides how long a run is.",
        )


def read_training_set(
    found: Sequence[FoundImage], vae_digest: str, *, check_images: bool = True, legacy_crop: bool = False
) -> list[TrainingImage]:
    """Return the images with size, bucket and crop, and with their cache where it fits the image, VAE and bucket.

    Each cache is read once. A cache that no longer fits is reported, and its image is to be encoded again; without
    `check_images` the image beside it is not read for that. Where pixels change from visit to visit, caches have no
    use. Raise `UserError` for a cache that does not fit where the image is gone, and for an image that cannot be used.
    """
    if legacy_crop:
        log.warning(LEGACY_CROP_NOTICE)
    images: list[TrainingImage] = []
    errors: list[UserError] = []
    for each in tqdm(found, desc="reading the training set", unit="image", disable=None):
        try:
            placed = in_bucket(each)
            cached = None
            if not each.subset.augmentation.changes_pixels:
                cached = _read_if_fitting(placed, cache_demands(each.subset, vae_digest, check_image=check_images))
            if cached is None:
                images.append(_from_file(placed, legacy=legacy_crop))
            else:
                images.append(_from_cache(placed, cached, legacy=legacy_crop))
        except UserError as error:
            errors.append(error)
    if errors:
        raise error_of_images(errors)
    require_faces(
        image.source
        for image in images
        if image.source is not None and image.subset.augmentation.face_crop_aug_range is not None
    )
    return images


def cache_demands(subset: Subset, vae_digest: str, *, check_image: bool = True) -> CacheDemands:
    """Return what the caches of a subset must agree with to be used."""
    return CacheDemands(
        vae_digest,
        flip=subset.augmentation.flip_aug,
        check_image=check_image,
        resize_interpolation=subset.augmentation.resize_interpolation,
    )


def fingerprints(images: Iterable[TrainingImage]) -> dict[str, str]:
    """Return the fingerprint of each image by its key, to notice on resuming that images or captions have changed."""
    return {image.key: image.fingerprint() for image in images}


def _found(
    key: str,
    entry: Entry,
    subset: Subset,
    by_stem: Mapping[str, Sequence[Path]],
    find_cache: Callable[[Path], Path],
) -> FoundImage:
    file = resolve_image(key, subset.image_dir, by_stem)
    cache = find_cache(resolve_cache(key, subset.image_dir) if file is None else file)
    separators = subset.captions.rules_l.caption_separator, subset.captions.rules_g.caption_separator
    captions = captions_of(entry, one_caption=subset.one_caption, separators=separators)
    weight = loss_weight(entry) * subset.loss_weight
    return FoundImage(key, captions, subset, train_resolution(entry), file, cache, weight)


def _read_if_fitting(found: FoundImage, demands: CacheDemands) -> CachedLatents | None:
    """Return what the cache file holds; None if there is none, or (reported) if it does not fit the image beside it."""
    if not is_file(found.cache):
        return None
    try:
        return read_fitting_cache(found.cache, found.file, found.bucket, demands)
    except UserError as error:
        if found.file is None:
            raise
        log.warning("%s It is encoded again.", error.problem)
        return None


def _from_cache(found: FoundImage, cached: CachedLatents, *, legacy: bool) -> TrainingImage:
    return TrainingImage(
        key=found.key,
        captions=found.captions,
        subset=found.subset,
        loss_weight=found.loss_weight,
        size=cached.original_size,
        bucket=cached.bucket,
        crop=cached.crop(legacy=legacy),
        latents=found.cache,
        content_digest=cached.content_digest,
    )


def _from_file(found: FoundImage, *, legacy: bool) -> TrainingImage:
    """Return the image without latents, in the bucket that the metadata names, or else the one of the rule."""
    assert found.file is not None  # or its cache would have been used, or refused
    size = read_size(found.file)
    if found.bucket is None or found.subset.metadata_file is None:
        assignment = found.subset.rule.assign(size)
    else:
        resized = covering_size(found.bucket, size)
        assignment = BucketAssignment(found.bucket, resized, found.bucket.aspect - size.aspect)
    bucket, resized, _ = assignment
    return TrainingImage(
        key=found.key,
        captions=found.captions,
        subset=found.subset,
        loss_weight=found.loss_weight,
        size=size,
        bucket=bucket,
        crop=crop_to_train(bucket, resized, size, legacy=legacy),
        source=BucketedImage(found.file, size, assignment, found.subset.augmentation.resize_interpolation),
    )
