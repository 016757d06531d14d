"""The images that were found, in columns: no object for each, and one of `FoundImage` for whoever asks for an image."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from library.captions.final_captions import CaptionPair
from library.data.columns import Captions, Texts, TextsBuilder, Variants
from library.data.found_images import FoundImage
from library.data.subsets import Subset
from library.images.buckets import ALPHA, MaskSource
from library.sdxl.sizes import Size

_NO_SIZE = (0, 0)
_T = TypeVar("_T")


class FoundImages(Sequence[FoundImage]):
    """Images in columns; that of a file which is not there is the empty text, of a size (0, 0)."""

    def __init__(
        self,
        subsets: Sequence[Subset],
        subset_of: np.ndarray,
        keys: Texts,
        variants_l: Variants,
        variants_g: Variants,
        files: Texts,
        caches: Texts,
        buckets: np.ndarray,
        sizes: np.ndarray,
        loss_weights: np.ndarray,
        own_keys: Texts | None = None,
        masks: Texts | None = None,
        in_shards: np.ndarray | None = None,
    ):
        self.subsets = tuple(subsets)
        self.subset_of = subset_of
        self.keys = keys
        self.variants_l = variants_l
        self.variants_g = variants_g
        self.files = files
        self.caches = caches
        self.buckets = buckets
        self.sizes = sizes
        self.loss_weights = loss_weights
        self.own_keys = own_keys
        self.masks = Texts.same("", len(keys)) if masks is None else masks
        self.in_shards = np.zeros(len(keys), bool) if in_shards is None else in_shards

    @classmethod
    def of(cls, images: Iterable[FoundImage]) -> "FoundImages":
        """Return images in columns."""
        if isinstance(images, FoundImages):
            return images
        builder = FoundBuilder()
        for image in images:
            builder.add(image)
        return builder.built()

    @classmethod
    def joined(cls, parts: Sequence["FoundImages"]) -> "FoundImages":
        """Return the images of several parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.of([])
        numbers: dict[int, tuple[int, Subset]] = {}  # by identity: equal subsets stay apart
        subset_of = []
        for part in parts:
            own_numbers = [numbers.setdefault(id(each), (len(numbers), each))[0] for each in part.subsets]
            subset_of.append(np.array(own_numbers, np.int32)[part.subset_of])
        subsets = [subset for _, subset in numbers.values()]
        own = None
        if any(part.own_keys is not None for part in parts):
            own = Texts.joined([part.keys if part.own_keys is None else part.own_keys for part in parts])
        return cls(
            subsets,
            np.concatenate(subset_of),
            Texts.joined([part.keys for part in parts]),
            Variants.joined([part.variants_l for part in parts]),
            Variants.joined([part.variants_g for part in parts]),
            Texts.joined([part.files for part in parts]),
            Texts.joined([part.caches for part in parts]),
            np.concatenate([part.buckets for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.loss_weights for part in parts]),
            own,
            Texts.joined([part.masks for part in parts]),
            np.concatenate([part.in_shards for part in parts]),
        )

    def rows_by(self, value: Callable[[Subset], _T]) -> dict[_T, np.ndarray]:
        """Return the rows of the images of the subsets for which `value` returns the same."""
        numbers: dict[_T, list[int]] = {}
        for number, subset in enumerate(self.subsets):
            numbers.setdefault(value(subset), []).append(number)
        if len(numbers) == 1:
            return {each: np.arange(len(self)) for each in numbers}
        return {each: np.flatnonzero(np.isin(self.subset_of, own)) for each, own in numbers.items()}

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> FoundImage: ...
    @overload
    def __getitem__(self, index: slice) -> "FoundImages": ...
    def __getitem__(self, index: int | slice) -> "FoundImage | FoundImages":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        file, bucket, size = self.files[index], self.buckets[index].tolist(), self.sizes[index].tolist()
        return FoundImage(
            self.keys[index],
            CaptionPair(self.variants_l[index], self.variants_g[index]),
            self.subsets[self.subset_of[index]],
            Size(*bucket) if any(bucket) else None,
            Path(file) if file else None,
            Path(self.caches[index]),
            float(self.loss_weights[index]),
            Size(*size) if any(size) else None,
            None if self.own_keys is None else self.own_keys[index],
            mask_source(self.masks[index]),
            bool(self.in_shards[index]),
        )

    def __iter__(self) -> Iterator[FoundImage]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: np.ndarray) -> "FoundImages":
        """Return some of the images, in the order of `rows`."""
        return FoundImages(
            self.subsets,
            self.subset_of[rows],
            self.keys.take(rows),
            self.variants_l.take(rows),
            self.variants_g.take(rows),
            self.files.take(rows),
            self.caches.take(rows),
            self.buckets[rows],
            self.sizes[rows],
            self.loss_weights[rows],
            None if self.own_keys is None else self.own_keys.take(rows),
            self.masks.take(rows),
            self.in_shards[rows],
        )

    def with_masks(self, mask: MaskSource) -> "FoundImages":
        """Return the images, all with a mask from the same source."""
        made = copy(self)
        made.masks = Texts.same(str(mask), len(self))
        return made

    @property
    def used_subsets(self) -> list[Subset]:
        """The subsets that have images here, in the order of the subsets."""
        return [self.subsets[number] for number in np.unique(self.subset_of).tolist()]

    def captions_by_subset(self) -> list[tuple[Subset, Captions]]:
        """Return the captions of each subset, by key; subsets in the order of their first images."""
        numbers, firsts = np.unique(self.subset_of, return_index=True)
        groups = []
        for number in numbers[np.argsort(firsts)].tolist():
            part = self if len(numbers) == 1 else self.take(np.flatnonzero(self.subset_of == number))
            groups.append((self.subsets[number], Captions(part.keys, part.variants_l, part.variants_g)))
        return groups


def mask_source(text: str) -> MaskSource | None:
    """Return the source of a mask as columns name it: a path, the alpha channel, or "" for none."""
    if text == ALPHA:
        return ALPHA
    return Path(text) if text else None


class FoundBuilder:
    """Columns in the making: images are added one by one."""

    def __init__(self) -> None:
        self._subsets: dict[int, tuple[int, Subset]] = {}  # by identity: equal subsets stay apart
        self._subset_of = array("i")
        self._texts = {name: TextsBuilder() for name in ("keys", "files", "caches", "own", "masks", "l", "g")}
        self._firsts = {"l": array("q", [0]), "g": array("q", [0])}
        self._numbers = {name: array("i") for name in ("buckets", "sizes")}
        self._weights = array("d")
        self._has_own_keys = False
        self._in_shards = array("b")

    def __len__(self) -> int:
        return len(self._subset_of)

    def add(self, image: FoundImage) -> None:
        """Add an image."""
        file = "" if image.file is None else str(image.file)
        own = image.key if image.own_key is None else image.own_key
        self._has_own_keys |= image.own_key is not None
        self.add_facts(
            image.key,
            *image.captions,
            subset=image.subset,
            bucket=image.bucket or _NO_SIZE,
            file=file,
            cache=str(image.cache),
            loss_weight=image.loss_weight,
            size=image.size or _NO_SIZE,
            own_key=own,
            mask=str(image.mask or ""),
            in_shards=image.in_shards,
        )

    def add_facts(
        self,
        key: str,
        variants_l: Sequence[str],
        variants_g: Sequence[str],
        *,
        subset: Subset,
        bucket: Sequence[int],
        file: str,
        cache: str,
        loss_weight: float,
        size: Sequence[int] = _NO_SIZE,
        own_key: str | None = None,
        mask: str = "",
        in_shards: bool = False,
    ) -> None:
        """Add what is known of an image."""
        number, _ = self._subsets.setdefault(id(subset), (len(self._subsets), subset))
        self._subset_of.append(number)
        texts = self._texts
        texts["keys"].add(key)
        texts["files"].add(file)
        texts["caches"].add(cache)
        texts["masks"].add(mask)
        if own_key is not None:
            texts["own"].add(own_key)
        for encoder, variants in (("l", variants_l), ("g", variants_g)):
            for text in variants:
                texts[encoder].add(text)
            firsts = self._firsts[encoder]
            firsts.append(firsts[-1] + len(variants))
        self._numbers["buckets"].extend(bucket)
        self._numbers["sizes"].extend(size)
        self._weights.append(loss_weight)
        self._in_shards.append(in_shards)

    def built(self) -> FoundImages:
        """Return the columns; nothing may be added afterwards."""
        texts = {name: builder.built() for name, builder in self._texts.items()}
        numbers: dict[str, Any] = {
            name: np.frombuffer(column, np.int32).reshape(-1, 2) for name, column in self._numbers.items()
        }
        return FoundImages(
            [subset for _, subset in self._subsets.values()],
            np.frombuffer(self._subset_of, np.int32),
            texts["keys"],
            Variants.from_flat(texts["l"], np.frombuffer(self._firsts["l"], np.int64)),
            Variants.from_flat(texts["g"], np.frombuffer(self._firsts["g"], np.int64)),
            texts["files"],
            texts["caches"],
            numbers["buckets"],
            numbers["sizes"],
            np.frombuffer(self._weights, np.float64),
            texts["own"] if self._has_own_keys else None,
            texts["masks"],
            np.frombuffer(self._in_shards, bool),
        )
