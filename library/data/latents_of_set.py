"""Which latents fit their images: by the index where files are as they were, else by reading them."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.config.errors import UserError
from library.data.columns import Texts
from library.data.folder_images import in_bucket
from library.data.found_images import FoundImage, error_of_images
from library.data.image_columns import FoundBuilder, FoundImages
from library.data.latent_cache import CacheDemands, CachedLatents, read_fitting
from library.data.latent_entries import Entries, states_of
from library.data.latent_index import PLACE, index_path
from library.data.latent_shards import Shards, shards_of
from library.data.subsets import Subset
from library.data.training_columns import IN_FILE, TrainingSet, as_content, empty_columns, set_facts
from library.images.augmentation import require_faces
from library.images.buckets import ALPHA, MaskSource
from library.images.crops import LEGACY_CROP_NOTICE, Crop, crop_to_train
from library.images.keys import is_file
from library.images.masks import black_mask
from library.images.reading import read_size
from library.sdxl.sizes import PIXELS_PER_LATENT, Size

log = logging.getLogger(__name__)

_MASKS: tuple[MaskSource | None, ...] = (None, ALPHA, Path())
"""The kinds of mask: none, from the alpha channel, from any file."""
_SIDE_BITS = 20
_SIDE_MASK = (1 << _SIDE_BITS) - 1


@dataclass(frozen=True)
class Trust:
    """What is believed of files: `index` that those of known size and time hold what they held, `images` all of them.

    With `keeps_index` what was read is written into the index.
    """

    index: bool = True
    images: bool = False
    keeps_index: bool = False


def read_training_set(
    found: Iterable[FoundImage],
    vae_digest: str,
    *,
    trust: Trust = Trust(),
    legacy_crop: bool = False,
) -> TrainingSet:
    """Return the images with size, bucket and crop, and with their cache where it fits the image, VAE and bucket.

    Each cache is read at most once: the index knows those whose files have not changed. A cache that no longer fits is
    reported, and its image is to be encoded again; images that are trusted are not read for that. Where pixels change
    from visit to visit, caches have no use. Raise `UserError` for a cache that does not fit where the image is gone,
    and for an image that cannot be used.
    """
    if legacy_crop:
        log.warning(LEGACY_CROP_NOTICE)
    images = FoundImages.of(found)
    reading = _Reading(images, vae_digest, trust, legacy=legacy_crop)
    for path, rows in images.rows_by(index_path).items():
        reading.read(path, rows)
    if reading.errors:
        raise error_of_images([reading.errors[row] for row in sorted(reading.errors)])
    made = reading.made()
    if any(subset.augmentation.face_crop_aug_range is not None for subset in made.used_subsets):
        require_faces(
            image.source
            for image in made
            if image.source is not None and image.subset.augmentation.face_crop_aug_range is not None
        )
    return made


def cache_demands(image: FoundImage, vae_digest: str, *, check_image: bool = True) -> CacheDemands:
    """Return what the cache of an image must agree with to be used."""
    return _demands(image.subset, image.mask, vae_digest, check_image=check_image)


def _demands(subset: Subset, mask: MaskSource | None, vae_digest: str, *, check_image: bool) -> CacheDemands:
    return CacheDemands(
        vae_digest,
        flip=subset.augmentation.flip_aug,
        mask=mask,
        check_image=check_image,
        resize_interpolation=subset.augmentation.resize_interpolation,
    )


def _mask_kinds(masks: Texts) -> np.ndarray:
    if not len(masks.block):
        return np.zeros(len(masks), np.int64)
    return np.fromiter(((mask != "") + (mask not in ("", ALPHA)) for mask in masks), np.int64, len(masks))


class _Reading:
    """The columns of a training set in the making."""

    def __init__(self, images: FoundImages, vae_digest: str, trust: Trust, *, legacy: bool):
        self.errors: dict[int, UserError] = {}
        self._found = images
        self._images = self._in_buckets(images)
        self._vae_digest = vae_digest
        self._trust = trust
        self._legacy = legacy
        self._mask_kinds = _mask_kinds(self._images.masks)
        self._columns = empty_columns(len(images))
        self._columns["subset_of"] = images.subset_of
        self._columns["loss_weights"] = images.loss_weights
        self._shards: list[Shards] = []
        self._shards_of = np.zeros(len(images), np.int32)
        self._rows_in_shards = np.full(len(images), -1)

    def _in_buckets(self, images: FoundImages) -> FoundImages:
        if not any(subset.reads_folder or subset.names_bucket for subset in images.used_subsets):
            return images
        builder = FoundBuilder()
        for row, image in enumerate(images):
            placed = image
            try:
                placed = in_bucket(image)
            except UserError as error:
                self.errors[row] = error
            builder.add(placed)
        return builder.built()

    def read(self, path: Path, rows: np.ndarray) -> None:
        """Read the latents of the images whose index is at `path`."""
        images = self._images if len(rows) == len(self._images) else self._images.take(rows)
        folders = {subset.image_dir for subset in images.used_subsets}
        entries = Entries(path, folders.pop() if len(folders) == 1 else None, images.caches, images.files, images.masks)
        self._find_in_shards(images, rows)
        known = np.zeros(len(rows), bool)
        if self._trust.index:
            known = entries.unchanged(self._places_in_shards(rows), check_images=not self._trust.images)
            for numbers, cached in entries.kinds(known):
                known[numbers] = self._fit(rows[numbers], cached)
            self._take_over(rows, entries, known)
        rest = np.flatnonzero(~known)
        for number in tqdm(rest, "reading the training set", unit="image", disable=None if len(rest) else True):
            row = int(rows[number])
            if row in self.errors:
                continue
            try:
                self._read_one(row, entries, int(number))
            except UserError as error:
                self.errors[row] = error
        if self._trust.keeps_index:
            entries.save()

    def _find_in_shards(self, images: FoundImages, rows: np.ndarray) -> None:
        """Note in which shards the latents of the images of one index are."""
        shards = shards_of(images.used_subsets[0]) if images.in_shards.any() else None
        if shards is None:
            return
        at = shards.rows_of(images.keys if images.own_keys is None else images.own_keys)
        self._rows_in_shards[rows] = np.where((at >= 0) & images.in_shards, at, -1)
        self._shards.append(shards)
        self._shards_of[rows] = len(self._shards) - 1

    def _places_in_shards(self, rows: np.ndarray) -> np.ndarray:
        places = np.zeros(len(rows), PLACE)
        at = self._rows_in_shards[rows]
        if (at >= 0).any():
            places[at >= 0] = self._shards[self._shards_of[rows[0]]].places[at[at >= 0]]
        return places

    def _fit(self, rows: np.ndarray, cached: CachedLatents) -> np.ndarray:
        """Return which of the images of some rows, whose latents are of one kind, fit what is demanded of them."""
        subset_of, buckets = self._images.subset_of[rows], self._images.buckets[rows].astype(np.int64)
        fits = np.zeros(len(rows), bool)
        asked = (subset_of.astype(np.int64) << 2 * _SIDE_BITS) + (buckets[:, 0] << _SIDE_BITS) + buckets[:, 1]
        asked = asked * len(_MASKS) + self._mask_kinds[rows]
        for case in np.unique(asked).tolist():
            rest, mask_kind = divmod(case, len(_MASKS))
            width, height = rest >> _SIDE_BITS & _SIDE_MASK, rest & _SIDE_MASK
            subset = self._images.subsets[rest >> 2 * _SIDE_BITS]
            demands = _demands(subset, _MASKS[mask_kind], self._vae_digest, check_image=False)
            bucket = Size(width, height) if width else cached.bucket
            if subset.augmentation.changes_pixels or cached.reasons_stale(demands, image_digest=None, bucket=bucket):
                continue
            fits |= asked == case
        return fits

    def _take_over(self, rows: np.ndarray, entries: Entries, known: np.ndarray) -> None:
        """Fill the rows of the images whose entries are known to hold, and to fit."""
        columns, found = self._columns, entries.entries
        numbers = slice(None) if known.all() else np.flatnonzero(known)  # a copy of all entries would be large
        chosen = rows[numbers]
        buckets = found["facts"]["latents"][numbers] * PIXELS_PER_LATENT
        columns["sizes"][chosen] = found["facts"]["original"][numbers]
        columns["buckets"][chosen] = columns["resized"][chosen] = buckets
        columns["crops"][chosen] = entries.crops(numbers, legacy=self._legacy)
        columns["where"][chosen] = IN_FILE
        columns["places"][chosen] = found["place"][numbers]
        columns["contents"][chosen] = found["content"][numbers]
        if found["mask_content"].any():
            columns["mask_contents"][chosen] = found["mask_content"][numbers]

    def _read_one(self, row: int, entries: Entries, number: int) -> None:
        image, columns = self._images[row], self._columns
        cached = None
        if not image.subset.augmentation.changes_pixels:
            demands = cache_demands(image, self._vae_digest, check_image=not self._trust.images)
            cached = self._in_shard(row, image, demands, entries, number)
            if cached is None:
                self._rows_in_shards[row] = -1
                cached = _read_if_fitting(image, demands, entries, number)
        if cached is None:
            set_facts(columns, row, *_from_file(self._found[row], legacy=self._legacy))
            return
        set_facts(columns, row, cached.original_size, cached.bucket, cached.bucket, cached.crop(legacy=self._legacy))
        columns["where"][row] = IN_FILE
        columns["contents"][row] = as_content(cached.content_digest)
        columns["mask_contents"][row] = as_content(cached.mask_digest)
        columns["places"][row] = entries.entries[number]["place"]

    def _in_shard(
        self, row: int, image: FoundImage, demands: CacheDemands, entries: Entries, number: int
    ) -> CachedLatents | None:
        """Return the latents in a shard; None if there are none, or (reported) if they do not fit the image."""
        if self._rows_in_shards[row] < 0:
            return None
        shard, place = self._shards[self._shards_of[row]].file_of(int(self._rows_in_shards[row]))
        return _noted(
            image, entries, number, demands, lambda: shard.read_fitting(place, image.file, image.bucket, demands)
        )

    def _caches(self) -> Texts:
        """Return the files of latents: shards, or those of the images."""
        if not self._shards:
            return self._images.caches
        texts, shards = [self._images.caches], np.full(len(self._images), -1)
        for number, each in enumerate(self._shards):
            mine = np.flatnonzero((self._shards_of == number) & (self._rows_in_shards >= 0))
            shards[mine] = each.files_of(self._rows_in_shards[mine]) + sum(map(len, texts))
            texts.append(Texts.of(str(shard.path) for shard in each.shards))
        return Texts.joined(texts).take(np.where(shards < 0, np.arange(len(shards)), shards))

    def made(self) -> TrainingSet:
        """Return the set: caches are named of images that have one, files of the others."""
        images, has = self._images, self._columns["where"] == IN_FILE
        texts = {
            "keys": images.keys,
            "files": self._found.files.where(~has),
            "caches": self._caches().where(has),
            "masks": images.masks,
        }
        return TrainingSet(images.subsets, self._columns, texts, {"l": images.variants_l, "g": images.variants_g})


def _read_if_fitting(found: FoundImage, demands: CacheDemands, entries: Entries, number: int) -> CachedLatents | None:
    """Return what the cache file holds; None if there is none, or (reported) if it does not fit the image beside it.

    Raise `UnusableImage` for a mask that leaves nothing of the image.
    """
    if not is_file(found.cache):
        return None
    return _noted(found, entries, number, demands, lambda: read_fitting(found.cache, found.file, found.bucket, demands))


def _noted(
    found: FoundImage,
    entries: Entries,
    number: int,
    demands: CacheDemands,
    read: Callable[[], tuple[CachedLatents, np.ndarray | None]],
) -> CachedLatents | None:
    """Return latents that are read now, and note them; None (reported) if they do not fit. Raise as the above."""
    states = states_of(found.file, found.mask)  # before reading: a change in between is noticed by the next start
    try:
        cached, place = read()
    except UserError as error:
        if found.file is None:
            raise
        log.warning("%s It is encoded again.", error.problem)
        return None
    if found.mask is not None and cached.alpha_mask is not None and not cached.alpha_mask.any():
        raise black_mask(found.mask, found.file or found.cache)
    entries.note(number, cached, place, states if demands.check_image else None)
    return cached


def _from_file(found: FoundImage, *, legacy: bool) -> tuple[Size, Size, Size, Crop]:
    """Return size, bucket, resized size and crop of an image without latents.

    The bucket is the one that the metadata names, or else that of the rule.
    """
    assert found.file is not None  # or its cache would have been used, or refused
    size = found.size or read_size(found.file)
    bucket, resized, _ = found.assignment(size)
    return size, bucket, resized, crop_to_train(bucket, resized, size, legacy=legacy)
