"""Columns of a set of images: texts and captions in a few blocks of memory, in place of objects for each image."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from library.captions.draws import Encoder
from library.captions.final_captions import CaptionPair
from library.config.errors import UserError

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 1 << 16


def num_distinct(numbers: np.ndarray) -> int:
    """Return how many different numbers there are: sorted, which is many times faster than `np.unique`."""
    ordered = np.sort(numbers)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(1, len(numbers))


class InSharedMemory(NamedTuple):
    """An array in memory that worker processes share when it is pickled for them, whatever starts them."""

    content: "torch.Tensor"
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> "InSharedMemory":
        """Return a copy of an array, or the same memory of one that is there. Raise `UserError` if there is no room."""
        import torch

        content = in_shared_memory(torch.empty(array.nbytes, dtype=torch.uint8))
        content.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(content, array.dtype, array.shape)

    def array(self) -> np.ndarray:
        """Return the array, in the same memory."""
        return self.content.numpy().view(self.dtype).reshape(self.shape)


def in_shared_memory(tensor: "torch.Tensor") -> "torch.Tensor":
    """Move a tensor to shared memory. Raise `UserError` if that is full."""
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"the shared memory (/dev/shm), through which worker processes hand over batches, is full ({error}).",
            "Start the container with --shm-size=8g or --ipc=host, or pass --max_data_loader_n_workers=0.",
        ) from error


class Texts(Sequence[str]):
    """Texts in one block of UTF-8: text i ends where `ends[i + 1]` says, and begins at `ends[i]`."""

    __slots__ = ("_shared", "block", "ends")

    def __init__(self, block: np.ndarray, ends: np.ndarray):
        self.block = block
        self.ends = ends
        self._shared: tuple[InSharedMemory, InSharedMemory] | None = None

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return texts in a block."""
        builder = TextsBuilder()
        for text in texts:
            builder.add(text)
        return builder.built()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "str | Texts":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.block[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        block, first = self.block.data, int(self.ends[0])
        for start in range(1, len(self.ends), _ROWS_AT_ONCE):
            for end in self.ends[start : start + _ROWS_AT_ONCE].tolist():
                yield str(block[first:end], "utf-8", "surrogatepass")
                first = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Texts):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.block, other.block)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        if self._shared is None:
            self._shared = InSharedMemory.of(self.block), InSharedMemory.of(self.ends)
            self.block, self.ends = (each.array() for each in self._shared)
        return _texts_from, self._shared

    @property
    def lengths(self) -> np.ndarray:
        """How many bytes each text has."""
        return np.diff(self.ends)

    def take(self, rows: np.ndarray) -> "Texts":
        """Return the texts of some rows, in their order."""
        return self._parts(self.ends[:-1][rows], self.lengths[rows])

    def without_start(self, start: str) -> "Texts":
        """Return the texts, of which those that begin with `start` have lost it."""
        expected = np.frombuffer(start.encode("utf-8", "surrogatepass"), np.uint8)
        cut = np.zeros(len(self), np.int64)
        rows = np.flatnonzero(self.lengths >= len(expected))
        for here in np.split(rows, range(_ROWS_AT_ONCE, len(rows), _ROWS_AT_ONCE)):
            begins = self.block[self.ends[here, None] + np.arange(len(expected))]
            cut[here] = len(expected) * (begins == expected).all(axis=1)
        return self._parts(self.ends[:-1] + cut, self.lengths - cut)

    def _parts(self, firsts: np.ndarray, lengths: np.ndarray) -> "Texts":
        """Return the parts of the block that begin at `firsts`."""
        ends = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        block = np.empty(ends[-1], np.uint8)
        for start in range(0, len(lengths), _ROWS_AT_ONCE):
            here = slice(start, min(start + _ROWS_AT_ONCE, len(lengths)))
            shifts = np.repeat(firsts[here] - ends[here], lengths[here])
            places = slice(ends[here.start], ends[here.stop])
            block[places] = self.block[np.arange(places.start, places.stop) + shifts]
        return Texts(block, ends)

    @classmethod
    def same(cls, text: str, count: int) -> "Texts":
        """Return one text so many times."""
        encoded = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        return cls(np.tile(encoded, count), np.arange(count + 1, dtype=np.int64) * len(encoded))

    def where(self, chosen: np.ndarray) -> "Texts":
        """Return the texts, empty where they are not chosen."""
        if chosen.all():
            return self
        ends = np.concatenate([[0], np.cumsum(self.lengths * chosen)])
        return Texts(self.block[np.repeat(chosen, self.lengths)] if chosen.any() else self.block[:0], ends)

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """Return the texts of several columns, one after another."""
        if len(parts) == 1:
            return parts[0]
        ends, length = [np.zeros(1, np.int64)], 0
        for part in parts:
            ends.append(part.ends[1:] + length)
            length += len(part.block)
        return cls(np.concatenate([part.block for part in parts]), np.concatenate(ends))


class TextsBuilder:
    """A column of texts in the making: they are added one by one."""

    __slots__ = ("_block", "_ends")

    def __init__(self) -> None:
        self._block, self._ends = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        """Add a text."""
        self._block += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._block))

    def built(self) -> Texts:
        """Return the column; nothing may be added afterwards."""
        return Texts(np.frombuffer(self._block, np.uint8), np.frombuffer(self._ends, np.int64))


def _texts_from(block: "InSharedMemory", ends: "InSharedMemory") -> Texts:
    return Texts(block.array(), ends.array())


class Variants(Sequence[tuple[str, ...]]):
    """The captions of one encoder: of image i the texts from `firsts[i]` to `firsts[i + 1]`; one each without that."""

    def __init__(self, texts: Texts, firsts: np.ndarray | None):
        self.texts = texts
        self.firsts = firsts

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]]) -> "Variants":
        """Return captions in columns."""
        firsts = array("q", [0])

        def flat() -> Iterator[str]:
            for variants in captions:
                yield from variants
                firsts.append(firsts[-1] + len(variants))

        texts = Texts.of(flat())
        return cls.from_flat(texts, np.frombuffer(firsts, np.int64))

    @classmethod
    def from_flat(cls, texts: Texts, firsts: np.ndarray) -> "Variants":
        """Return captions of their texts one after another."""
        is_single = np.array_equal(firsts, np.arange(len(firsts)))
        return cls(texts, None if is_single else firsts)

    def __len__(self) -> int:
        return len(self.texts) if self.firsts is None else len(self.firsts) - 1

    def __getitem__(self, index: Any) -> Any:
        if self.firsts is None:
            return (self.texts[index],)
        return tuple(self.texts[place] for place in range(*self.firsts[index : index + 2].tolist()))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        if self.firsts is None:
            for text in self.texts:
                yield (text,)
            return
        texts = iter(self.texts)
        for count in np.diff(self.firsts).tolist():
            yield tuple(next(texts) for _ in range(count))

    @property
    def num_several(self) -> int:
        """How many images have more than one."""
        return 0 if self.firsts is None else int((np.diff(self.firsts) > 1).sum())

    @property
    def num_different(self) -> int:
        """How many different captions there are."""
        if self.firsts is None:
            return num_distinct(np.fromiter(map(hash, self.texts), np.int64, len(self)))
        return len(set(self))

    def take(self, rows: np.ndarray) -> "Variants":
        """Return the captions of some images."""
        if self.firsts is None:
            return Variants(self.texts.take(rows), None)
        return Variants.of(self[row] for row in rows.tolist())

    @classmethod
    def joined(cls, parts: Sequence["Variants"]) -> "Variants":
        """Return the captions of several columns, one after another."""
        if len(parts) == 1:
            return parts[0]
        if any(part.firsts is not None for part in parts):
            return cls.of(variants for part in parts for variants in part)
        return cls(Texts.joined([part.texts for part in parts]), None)


class Captions(Mapping[str, CaptionPair]):
    """The captions of some images by their keys, in columns."""

    def __init__(self, keys: Texts, variants_l: Variants, variants_g: Variants):
        self.keys_column = keys
        self._variants: dict[Encoder, Variants] = {"l": variants_l, "g": variants_g}

    @classmethod
    def of(cls, captions: Mapping[str, CaptionPair]) -> "Captions":
        """Return captions in columns."""
        if isinstance(captions, Captions):
            return captions
        pairs = captions.values()
        return cls(
            Texts.of(captions),
            Variants.of(pair.variants_l for pair in pairs),
            Variants.of(pair.variants_g for pair in pairs),
        )

    def variants(self, encoder: Encoder) -> Variants:
        """Return the captions of one encoder."""
        return self._variants[encoder]

    def __len__(self) -> int:
        return len(self.keys_column)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_column)

    def __getitem__(self, key: str) -> CaptionPair:
        index = self.keys_column.index(key)
        return CaptionPair(self._variants["l"][index], self._variants["g"][index])

    def items(self) -> Any:
        """Return each key with its captions, in one pass."""
        pairs = map(CaptionPair, self._variants["l"], self._variants["g"])
        return zip(self.keys_column, pairs, strict=True)

    def values(self) -> Any:
        """Return the captions, in one pass."""
        return map(CaptionPair, self._variants["l"], self._variants["g"])
