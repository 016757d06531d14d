"""Metadata, images and caches to the list of images to train on."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from library.config.digests import digest, file_digest
from library.config.errors import UserError, error_of_errors
from library.config.magnitudes import MOST_VISITS
from library.data.augmentation import require_faces
from library.data.buckets import BucketedImage, MaskSource
from library.data.captions import CaptionPair
from library.data.crops import LEGACY_CROP_NOTICE, Crop, crop_to_train
from library.data.folder_images import find_images_of_folder, in_bucket, with_distinct_keys
from library.data.found_images import FoundImage, error_of_images
from library.data.image_keys import is_file
from library.data.images import read_size
from library.data.latent_cache import CacheDemands, CachedLatents, read_cache, read_fitting_cache
from library.data.mask_files import require_usable_masks, with_masks
from library.data.masks import black_mask, mask_digest
from library.data.metadata_images import find_images_of_metadata
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

    `latents` are in memory or in the cache file that is named, `content_digest` and `mask_digest` (None for an alpha
    channel) tell what they and their mask were made from. Without latents, `source` is encoded in each step.
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
    mask: MaskSource | None = None
    mask_digest: str | None = None

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
        if self.mask is not None and (cached.alpha_mask is None or cached.mask_digest != self.mask_digest):
            raise UserError(
                f"'{self.latents}' was replaced while training: it holds no mask, or another one.",
                "Start again, or restore the latents and continue from a saved state.",
            )
        return cached

    def fingerprint(self) -> str:
        """Return a digest of captions, bucket, the image and its mask, whether latents are cached and what it is for.

        The files of image and mask are read unless the latents are cached. Raise `UserError` if one cannot be read.
        """
        if self.source is not None and not self.has_latents:
            content, kind = file_digest(self.source.path), "pixels"
        else:
            assert self.content_digest is not None
            content, kind = self.content_digest, "latents"
        captions = ("\n".join(variants) for variants in self.captions)
        mask = [] if self.mask is None else ["mask", self._mask_digest() or "alpha"]
        parts = (*captions, str(self.bucket), kind, content, *["regularization"] * self.subset.is_reg, *mask)
        encoded = [part.encode("utf-8", errors="surrogatepass") for part in parts]
        with_lengths = (half for part in encoded for half in (len(part).to_bytes(8, "little"), part))
        return digest(with_lengths, _FINGERPRINT_BYTES).hex()

    def _mask_digest(self) -> str | None:
        return self.mask_digest if self.has_latents else mask_digest(self.mask)


def find_training_images(subsets: Sequence[Subset]) -> list[FoundImage]:
    """Return every image of the subsets with its files; reads the metadata, lists the folders and opens no network.

    Raise `UserError` naming, of all subsets, the images that lack a caption, or else those that have neither a usable
    image file nor a usable cache, or no bucket; report what else the user should know.
    """
    is_alone = len(subsets) == 1
    found: list[FoundImage] = []
    errors: list[UserError] = []
    for subset in subsets:
        try:
            images = find_images_of_folder(subset) if subset.reads_folder else find_images_of_metadata(subset, is_alone)
            _require_countable(len(images), subset)
            found += with_masks(images, subset)
        except UserError as error:
            errors.append(error)
    if errors:
        raise error_of_errors("subsets cannot be trained", errors)
    _require_others_than_regularization(found, subsets)
    require_usable_masks(found)
    return with_distinct_keys(found)


def _require_countable(num_images: int, subset: Subset) -> None:
    num_visits = num_images * subset.num_repeats
    if num_visits > MOST_VISITS:
        raise UserError(
            f"{subset.num_repeats} repeats of the images of '{subset.source or subset.image_dir}' make an epoch of "
            f"{num_visits} images.",
            f"Lower --dataset_repeats: an epoch may have {MOST_VISITS}. --max_train_steps decides how long a run is.",
        )


def _require_others_than_regularization(found: Sequence[FoundImage], subsets: Sequence[Subset]) -> None:
    for dataset in {subset.dataset for subset in subsets}:
        members = [image.subset for image in found if image.subset.dataset == dataset]
        if members and all(subset.is_reg for subset in members):
            raise UserError(
                f"all images of '{members[0].source or members[0].image_dir}' are regularization images (is_reg).",
                "Add the images to train on.",
            )
    is_weighted = any(subset.prior_loss_weight != 1 for subset in subsets)
    if is_weighted and not any(image.subset.is_reg for image in found):
        raise UserError(
            "--prior_loss_weight has no effect: no image is marked as a regularization image.",
            "Mark them by is_reg, or leave the flag out.",
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
                cached = _read_if_fitting(placed, cache_demands(each, vae_digest, check_image=check_images))
            if cached is None:
                images.append(_from_file(each, legacy=legacy_crop))
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


def cache_demands(image: FoundImage, vae_digest: str, *, check_image: bool = True) -> CacheDemands:
    """Return what the cache of an image must agree with to be used."""
    return CacheDemands(
        vae_digest,
        flip=image.subset.augmentation.flip_aug,
        mask=image.mask,
        check_image=check_image,
        resize_interpolation=image.subset.augmentation.resize_interpolation,
    )


def fingerprints(images: Iterable[TrainingImage]) -> dict[str, str]:
    """Return the fingerprint of each image by its key, to notice on resuming that images or captions have changed."""
    return {image.key: image.fingerprint() for image in images}


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
    if found.mask is not None and cached.alpha_mask is not None and not cached.alpha_mask.any():
        raise black_mask(found.mask, found.file or found.cache)
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
        mask=found.mask,
        mask_digest=cached.mask_digest,
    )


def _from_file(found: FoundImage, *, legacy: bool) -> TrainingImage:
    """Return the image without latents, in the bucket that the metadata names, or else the one of the rule."""
    assert found.file is not None  # or its cache would have been used, or refused
    size = found.size or read_size(found.file)
    assignment = found.assignment(size)
    bucket, resized, _ = assignment
    return TrainingImage(
        key=found.key,
        captions=found.captions,
        subset=found.subset,
        loss_weight=found.loss_weight,
        size=size,
        bucket=bucket,
        crop=crop_to_train(bucket, resized, size, legacy=legacy),
        source=BucketedImage(found.file, size, assignment, found.subset.augmentation.resize_interpolation, found.mask),
        mask=found.mask,
    )
