"""A search for the images of metadata: entries, read as a stream, to image files, caches and captions in columns."""

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from library.captions.final_captions import CaptionPair
from library.config.errors import UserError, listed
from library.data.cache_files import cache_finder
from library.data.caption_sources import CaptionFile, caption_files_beside, warn_of_suspects
from library.data.caption_states import CaptionStates, StatesBuilder
from library.data.columns import num_distinct
from library.data.found_images import FoundImage, require_own_files, require_usable
from library.data.image_columns import FoundBuilder, FoundImages
from library.data.latent_cache import cache_path
from library.data.latent_shards import shards_of
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    Entry,
    Metadata,
    Sources,
    captions_of,
    is_reg,
    loss_weight,
    require_captions,
    sources_of,
    train_resolution,
)
from library.data.subset_entries import metadata_of
from library.data.subsets import Subset
from library.images.files import FolderNames, Suffixes, warn_of_unreadable
from library.images.keys import is_found_by_name, resolve_cache, resolve_image
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

_NO_SUFFIXES = Suffixes(frozenset(), (), ())
_NO_CAPTIONS = CaptionPair((), ())
_CACHE = ".npz"


class MetadataSearch:
    """The images of metadata that is read entry by entry.

    Most have their image and their latents where their keys say, which the names in the folder tell; the others are
    looked for one by one.
    """

    def __init__(self, subset: Subset):
        self._subset = subset
        self._regular = subset.as_regularization()
        self._changes_pixels = subset.augmentation.changes_pixels
        self._names: FolderNames | None = None
        self._plain = FoundBuilder()
        self._others: dict[int, FoundImage] = {}  # by their places among all
        self._count = 0
        self._sources: Counter[Sources] = Counter()
        self._lacking: Metadata = {}
        self._error: UserError | None = None
        self._suspects: list[tuple[CaptionFile, Entry]] = []
        self._caption_states = StatesBuilder()
        self._find_cache = cache_finder()
        self.notices: list[str] = []
        self._is_warned = False
        shards = shards_of(subset)
        self._in_shards = frozenset(() if shards is None else shards.keys)
        self._num_in_shards = 0
        compares = subset.metadata_file is not None and not subset.one_caption
        self._since = subset.metadata_file.stat().st_mtime_ns if compares and subset.metadata_file else None
        rules = subset.captions
        self._separators = rules.rules_l.caption_separator, rules.rules_g.caption_separator

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        assert self._names is not None
        return self._names.by_stem()

    def add(self, key: str, entry: Entry) -> None:
        """Add the image of an entry."""
        if self._names is None:  # once the metadata is known to be one
            self._names = FolderNames(self._subset.image_dir)
            unreadable = self._names.unreadable()
            self._is_warned = bool(unreadable)
            warn_of_unreadable(unreadable)
        sources = sources_of(entry, one_caption=self._subset.one_caption)
        self._sources[sources] += 1
        if None in sources:
            self._lacking[key] = entry
            return
        subset = self._regular if is_reg(entry) else self._subset
        captions = captions_of(entry, one_caption=subset.one_caption, separators=self._separators)
        bucket, weight = train_resolution(entry), loss_weight(entry) * subset.loss_weight
        in_shards = key in self._in_shards
        self._num_in_shards += in_shards
        start, suffixes = self._place(key, in_shards=in_shards)
        if start is not None and bucket is not None and not self._changes_pixels:
            file, cache = start + suffixes.images[0], start + _CACHE
            self._plain.add_facts(
                key,
                *captions,
                subset=subset,
                bucket=bucket,
                file=file,
                cache=cache,
                loss_weight=weight,
                in_shards=in_shards,
            )
        else:
            try:
                image = self._looked_for(key, subset)
                image = image._replace(captions=captions, bucket=bucket, loss_weight=weight, in_shards=in_shards)
            except UserError as error:
                self._error = self._error or error
                return
            self._others[self._count] = image
            start = None if image.file is None else os.path.splitext(image.file)[0]  # noqa: PTH122
            suffixes = _NO_SUFFIXES
        self._count += 1
        if self._since is not None and start is not None:
            present = suffixes.all if suffixes.all else None
            self._compare_captions(start, key, entry, present)

    def _compare_captions(self, start: str, key: str, entry: Entry, present: Container[str] | None) -> None:
        assert self._since is not None
        extensions = self._subset.extension_l, self._subset.extension_g
        for file in caption_files_beside(start, key, entry, extensions, present):
            self._caption_states.add(file)
            if file.may_have_changed(self._since):
                self._suspects.append((file, entry))

    def _place(self, key: str, *, in_shards: bool) -> tuple[str | None, Suffixes]:
        """Return what precedes the suffixes of image and latents, and these; None unless the key tells where."""
        assert self._names is not None
        names, top = self._names, self._names.start
        folder, stem, suffix = top, key, None
        if key not in names.folders[top]:
            if not key.startswith(top):
                return None, _NO_SUFFIXES
            head, name = os.path.split(key)
            folder = os.path.join(head, "")  # noqa: PTH118
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
        found = names.folders.get(folder, {}).get(stem)
        if found is None:
            return None, _NO_SUFFIXES
        suffixes = names.described(found)
        is_one = len(suffixes.images) == 1 and suffix in (None, suffixes.images[0])
        return (folder + stem, suffixes) if is_one and (in_shards or _CACHE in suffixes.all) else (None, _NO_SUFFIXES)

    def _looked_for(self, key: str, subset: Subset) -> FoundImage:
        folder = self._subset.image_dir
        file = resolve_image(key, folder, self._by_stem)
        cache = self._find_cache(resolve_cache(key, folder) if file is None else file)
        return FoundImage(key, _NO_CAPTIONS, subset, None, file, cache, 1.0)

    def found(self, *, is_alone: bool) -> FoundImages:
        """Return the images; report what the user should know, of which `notices` are no warnings.

        Raise as `find_images_of_metadata`.
        """
        source = self._subset.source
        assert source is not None
        if self._lacking:
            metadata_of(self._subset)  # which names a key that comes twice
            require_captions(self._lacking, source, one_caption=self._subset.one_caption)
        sentence = sentence_of_sources(self._sources, one_caption=self._subset.one_caption)
        if sentence is not None:
            self._tell(sentence)
        if self._error is not None:
            raise self._error
        others = list(self._others.values())
        images = self._joined(others)
        if _some_alike(images.keys):
            metadata_of(self._subset)  # which names the key that comes twice
        written = (str(each.cache if each.file is None else cache_path(each.file)) for each in others)
        if _some_alike(chain(self._plain_images.caches, written)):
            require_own_files(images, self._subset.image_dir)
        usable = require_usable(others, self._subset)
        images = self._joined(usable)
        for notice in self._notices(images, usable, is_alone=is_alone):
            self._tell(notice)
        if self._in_shards and self._num_in_shards < len(images):
            lacking = [f"'{key}'" for key in images.keys if key not in self._in_shards]
            self._is_warned = True
            log.warning(
                "the shards beside '%s' lack %d images, whose latents are looked for beside them: %s",
                *(source, len(lacking), listed(lacking)),
            )
        if self._suspects:
            warn_of_suspects(source, self._suspects)
        return images

    def _tell(self, notice: str) -> None:
        self.notices.append(notice)
        log.info("%s", notice)

    @property
    def is_plain(self) -> bool:
        """Whether metadata and names alone decided what was found, and there was nothing to warn of."""
        return not (self._others or self._suspects or self._is_warned)

    def caption_states(self) -> CaptionStates:
        """Return the caption files beside the images, and as which the metadata has them."""
        return self._caption_states.built()

    def _joined(self, others: Sequence[FoundImage]) -> FoundImages:
        """Return all images in the order of the metadata; `others` are in the places of `_others`."""
        if not others:
            return self._plain_images
        if not len(self._plain_images):
            return FoundImages.of(others)
        places = np.fromiter(self._others, np.int64, len(others))
        is_other = np.zeros(self._count, bool)
        is_other[places] = True
        rows = np.empty(self._count, np.int64)
        rows[~is_other] = np.arange(len(self._plain_images))
        rows[is_other] = len(self._plain_images) + np.arange(len(others))
        return FoundImages.joined([self._plain_images, FoundImages.of(others)]).take(rows)

    @cached_property
    def _plain_images(self) -> FoundImages:
        return self._plain.built()

    def _notices(self, images: FoundImages, others: Iterable[FoundImage], *, is_alone: bool) -> Iterator[str]:
        """Yield what the user should know of images that can be trained; `is_alone` says that there are no others."""
        folder, resolution = self._subset.image_dir, self._subset.rule.max_resolution
        moved = [f"'{each.key}'" for each in others if is_found_by_name(each.key, each.file or each.cache, folder)]
        if moved:
            yield f"{len(moved)} keys are paths of another place; found by name in '{folder}': {listed(moved)}"
        unused = self._unused(images) if is_alone else []
        if unused:
            yield f"{len(unused)} images of '{folder}' are not in the metadata and are not trained: {listed(unused)}"
        areas = images.buckets[:, 0].astype(np.int64) * images.buckets[:, 1]
        if not areas.any():
            return
        new = [f"'{image.key}'" for image in others if image.bucket is None and not image.has_cache]
        if new:
            yield (
                f"{len(new)} images have no bucket, unlike the others, and are trained at the resolution "
                f"{resolution}: {listed(new)}. Run prepare_buckets_latents.py again to prepare them."
            )
        largest = Size(*images.buckets[int(areas.argmax())].tolist())
        if not resolution.area / 2 < largest.area <= resolution.area:
            yield (
                f"the metadata was prepared for other sizes than the resolution {resolution}: its largest bucket is "
                f"{largest}. Images are trained at the size that was prepared."
            )

    def _unused(self, images: FoundImages) -> list[str]:
        """Return the names of the images in the folder that have no entry."""
        assert self._names is not None
        counts = Counter(suffixes for names in self._names.folders.values() for suffixes in names.values())
        num_images = sum(count * len(self._names.described(suffixes).images) for suffixes, count in counts.items())
        if not self._others and num_images == len(images):
            return []  # each entry has another image: their caches are different
        used = set(images.files)
        return [f"'{path.name}'" for paths in self._by_stem.values() for path in paths if str(path) not in used]


def _some_alike(texts: Iterable[str]) -> bool:
    """Return whether two of the texts may be the same."""
    hashes = np.fromiter(map(hash, texts), np.int64)
    return num_distinct(hashes) < len(hashes)


def sentence_of_sources(sources: Counter[Sources], *, one_caption: bool = False) -> str | None:
    """Return where captions are from, of so many images each: "812 images: L from 'tags', G from 'caption'".

    Return None where all are from the keys of L and G.
    """
    if sources.keys() <= {(COLUMN_L.metadata_key, COLUMN_G.metadata_key)}:
        return None
    parts = []
    for (source_l, source_g), count in sources.most_common():
        origin = f"L and G from {source_l}" if one_caption else f"L from '{source_l}', G from '{source_g}'"
        parts.append(f"{count} images: {origin}")
    return "; ".join(parts)
