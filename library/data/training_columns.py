"""The images that are trained on, in columns, which worker processes share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from library.captions.draws import Encoder
from library.captions.final_captions import CaptionPair, first_text
from library.data.columns import InSharedMemory, Texts, Variants
from library.data.image_columns import mask_source
from library.data.latent_cache import CachedLatents
from library.data.latent_index import CONTENT_BYTES, PLACE
from library.data.subsets import Subset
from library.data.training_images import KeptLatents, TrainingImage
from library.images.buckets import BucketAssignment, BucketedImage
from library.images.crops import Crop
from library.sdxl.sizes import Size

NONE, IN_FILE, IN_MEMORY = 0, 1, 2
"""Where the latents of an image are."""


class TrainingSet(Sequence[TrainingImage]):
    """The images in columns: [N] or [N, 2] (width, height) each. Those that are pickled are in shared memory.

    `subset_of` numbers `subsets`; `resized` is what an image without latents is resized to; `where` says where its
    latents are, `places` and `contents` are as in `TrainingImage`.
    """

    def __init__(
        self,
        subsets: Sequence[Subset],
        columns: Mapping[str, np.ndarray],
        texts: Mapping[str, Texts],
        variants: Mapping[Encoder, Variants],
        in_memory: Mapping[int, CachedLatents] | None = None,
    ):
        self.subsets = tuple(subsets)
        self.columns = dict(columns)
        self.texts = dict(texts)
        self.variants = dict(variants)
        self._in_memory = dict(in_memory or {})
        self._shared: dict[str, InSharedMemory] | None = None

    @classmethod
    def of(cls, images: Iterable[TrainingImage]) -> "TrainingSet":
        """Return images in columns."""
        if isinstance(images, TrainingSet):
            return images
        listed = list(images)
        subsets = {id(image.subset): image.subset for image in listed}
        number_of = {identity: number for number, identity in enumerate(subsets)}
        columns = empty_columns(len(listed))
        for row, image in enumerate(listed):
            resized = image.bucket if image.source is None else image.source.assignment.resized
            set_facts(columns, row, image.size, image.bucket, resized, image.crop)
            columns["subset_of"][row] = number_of[id(image.subset)]
            columns["loss_weights"][row] = image.loss_weight
            columns["where"][row] = _where(image.latents)
            columns["contents"][row] = as_content(image.content_digest)
            columns["mask_contents"][row] = as_content(image.mask_digest)
            if image.place is not None:
                columns["places"][row] = image.place
        texts = {
            "keys": Texts.of(image.key for image in listed),
            "files": Texts.of("" if image.source is None else str(image.source.path) for image in listed),
            "masks": Texts.of(str(image.mask or "") for image in listed),
            "caches": Texts.of(str(image.latents) if isinstance(image.latents, Path) else "" for image in listed),
        }
        variants: dict[Encoder, Variants] = {
            "l": Variants.of(image.captions.variants_l for image in listed),
            "g": Variants.of(image.captions.variants_g for image in listed),
        }
        in_memory = {row: image.latents for row, image in enumerate(listed) if isinstance(image.latents, CachedLatents)}
        return cls(list(subsets.values()), columns, texts, variants, in_memory)

    def __len__(self) -> int:
        return len(self.texts["keys"])

    @overload
    def __getitem__(self, index: int) -> TrainingImage: ...
    @overload
    def __getitem__(self, index: slice) -> "TrainingSet": ...
    def __getitem__(self, index: int | slice) -> "TrainingImage | TrainingSet":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        columns, texts = self.columns, self.texts
        subset = self.subsets[columns["subset_of"][index]]
        size, bucket = Size(*columns["sizes"][index].tolist()), Size(*columns["buckets"][index].tolist())
        where, file = int(columns["where"][index]), texts["files"][index]
        latents: Path | CachedLatents | None = None
        if where == IN_FILE:
            latents = Path(texts["caches"][index])
        elif where == IN_MEMORY:
            latents = self._in_memory[index]
        place, mask = columns["places"][index], mask_source(texts["masks"][index])
        source = None
        if file:
            assignment = BucketAssignment(
                bucket, Size(*columns["resized"][index].tolist()), bucket.aspect - size.aspect
            )
            source = BucketedImage(Path(file), size, assignment, subset.augmentation.resize_interpolation, mask)
        return TrainingImage(
            texts["keys"][index],
            CaptionPair(self.variants["l"][index], self.variants["g"][index]),
            subset,
            size,
            bucket,
            Crop(*(int(side) if side.is_integer() else side for side in columns["crops"][index].tolist())),
            latents,
            columns["contents"][index].decode() or None,
            source,
            float(columns["loss_weights"][index]),
            mask,
            columns["mask_contents"][index].decode() or None,
            place if where == IN_FILE and place["state"]["size"] else None,
        )

    def __iter__(self) -> Iterator[TrainingImage]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: np.ndarray) -> "TrainingSet":
        """Return some of the images, in the order of `rows`."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        texts = {name: column.take(rows) for name, column in self.texts.items()}
        variants = {encoder: column.take(rows) for encoder, column in self.variants.items()}
        in_memory = {new: self._in_memory[old] for new, old in enumerate(rows.tolist()) if old in self._in_memory}
        return TrainingSet(self.subsets, columns, texts, variants, in_memory)

    def with_latents(self, found: Mapping[int, KeptLatents]) -> "TrainingSet":
        """Return the images with the latents of some rows."""
        columns = {name: column.copy() for name, column in self.columns.items()}
        caches, in_memory = list(self.texts["caches"]), dict(self._in_memory)
        for row, (latents, content, mask_content, place) in found.items():
            columns["where"][row] = _where(latents)
            columns["contents"][row] = as_content(content)
            columns["mask_contents"][row] = as_content(mask_content)
            if isinstance(latents, CachedLatents):
                in_memory[row] = latents
                continue
            caches[row] = str(latents)
            if place is not None:
                columns["places"][row] = place
        return TrainingSet(self.subsets, columns, self.texts | {"caches": Texts.of(caches)}, self.variants, in_memory)

    @cached_property
    def all_have_latents(self) -> bool:
        """Whether no image is encoded in the steps."""
        return bool(self.columns["where"].all())

    @property
    def used_subsets(self) -> list[Subset]:
        """The subsets that have images."""
        return [self.subsets[number] for number in np.unique(self.columns["subset_of"]).tolist()]

    def of_subset(self, value: Any) -> np.ndarray:
        """Return for each image what `value` returns of its subset."""
        return np.array([value(subset) for subset in self.subsets])[self.columns["subset_of"]]

    @property
    def kinds(self) -> np.ndarray:
        """The kind of each image as a number."""
        numbers = self.of_subset(lambda subset: subset.dataset).astype(np.int64)
        for column in (self.columns["buckets"][:, 0], self.columns["buckets"][:, 1]):
            numbers = (numbers << 20) + column
        return (numbers << 1) + (self.columns["where"] != NONE)

    def first_texts(self, encoder: Encoder) -> Iterator[str]:
        """Yield the text of each image without chance, as `first_text` makes it."""
        subset_of = self.columns["subset_of"]
        plain = self.variants[encoder].firsts is None
        if plain and all(subset.captions.of(encoder).changes_nothing for subset in self.used_subsets):
            yield from self.variants[encoder].texts
            return
        for number, variants in zip(subset_of.tolist(), self.variants[encoder], strict=True):
            yield first_text(CaptionPair(variants, variants), self.subsets[number].captions, encoder)

    def __getstate__(self) -> dict[str, Any]:
        if self._shared is None:  # once, however many workers there are
            self._shared = {name: InSharedMemory.of(column) for name, column in self.columns.items()}
            self.columns = {name: each.array() for name, each in self._shared.items()}
        return vars(self) | {"columns": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.columns = {name: each.array() for name, each in state["_shared"].items()}


def as_content(content_digest: str | None) -> bytes:
    """Return a content digest as the column of them has it."""
    return (content_digest or "").encode()


def _where(latents: Path | CachedLatents | None) -> int:
    return NONE if latents is None else IN_FILE if isinstance(latents, Path) else IN_MEMORY


def empty_columns(num_images: int) -> dict[str, np.ndarray]:
    """Return the columns of so many images."""
    sizes = {name: np.zeros((num_images, 2), np.int32) for name in ("sizes", "buckets", "resized")}
    return {
        **sizes,
        "subset_of": np.zeros(num_images, np.int32),
        "crops": np.zeros((num_images, 3)),
        "loss_weights": np.ones(num_images),
        "where": np.zeros(num_images, np.uint8),
        "places": np.zeros(num_images, PLACE),
        **{name: np.zeros(num_images, f"S{CONTENT_BYTES}") for name in ("contents", "mask_contents")},
    }


def set_facts(columns: Mapping[str, np.ndarray], row: int, size: Size, bucket: Size, resized: Size, crop: Crop) -> None:
    """Write sizes and crop of an image into the columns."""
    for name, value in (("sizes", size), ("buckets", bucket), ("resized", resized), ("crops", crop)):
        columns[name][row] = value
