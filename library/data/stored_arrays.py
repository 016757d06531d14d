"""The arrays of an `.npz` file, read by their places in it where they are stored as NumPy stores them."""

import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from library.data.file_states import state_from

log = logging.getLogger(__name__)

_LARGE_STRANGER = 100_000_000
_END = struct.Struct("<4s4H2LH")  # of the list of members
_MEMBER = struct.Struct("<4s6H3L5H2L")  # in the list of members
_LOCAL = struct.Struct("<4s5H3L2H")  # before the bytes of a member
_STORED = 0
_IS_ENCRYPTED = 1
_LARGEST_OF_ZIP = 0xFFFFFFFF  # where a size stands elsewhere
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|][fiuU]\d+)', 'fortran_order': False, 'shape': \(((?:\d+(?:, \d+)*,?)?)\), \} *\n"
)


class Place(NamedTuple):
    """Where the numbers of an array lie in its file: `offset` in bytes, and what they are."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class StoredArrays:
    """The arrays of the bytes of an `.npz` file, which had a state when they were read.

    Raise `NotStored` for a file that is compressed, damaged or laid out in another way than NumPy's `savez` does:
    `numpy.load` reads it, or says what is wrong with it.
    """

    def __init__(self, data: bytes | memoryview, state: tuple[int, int, int]):
        self._data = memoryview(data)
        self.state = state
        self._members = _members(self._data)

    @classmethod
    def read(cls, path: Path) -> "StoredArrays":
        """Return the arrays of a file. Raise `OSError` if it cannot be read."""
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            state = state_from(os.fstat(file.fileno()))
            return cls(file.readall() or b"", state)

    @property
    def names(self) -> set[str]:
        """The names of the members."""
        return set(self._members)

    def num_bytes_of(self, name: str) -> int:
        """Return the bytes of a member, its header included."""
        return self._members[name][1]

    def place_of(self, name: str) -> Place:
        """Return where the numbers of an array lie. Raise `NotStored` for a header that NumPy does not write."""
        start, size, _ = self._members[name]
        header_bytes = int.from_bytes(self._data[start + 8 : start + 10], "little")
        header = bytes(self._data[start + 10 : start + 10 + header_bytes])
        match = _HEADER.fullmatch(header)
        if bytes(self._data[start : start + 8]) != _MAGIC or match is None:
            raise NotStored(f"the header of {name} is not NumPy's")
        shape = tuple(int(side) for side in match[2].decode().replace(",", " ").split())
        place = Place(start + 10 + header_bytes, match[1].decode(), shape)
        if num_bytes_at(place) != size - 10 - header_bytes:
            raise NotStored(f"{name} has another size than it says")
        return place

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array that can be written to. Raise `NotStored` where its bytes are not those that were written."""
        start, size, checksum = self._members[name]
        if zlib.crc32(self._data[start : start + size]) != checksum:
            raise NotStored(f"{name} is damaged")
        place = self.place_of(name)
        dtype = np.dtype(place.dtype)
        count = num_bytes_at(place) // dtype.itemsize
        return np.frombuffer(self._data, dtype, count, place.offset).reshape(place.shape).copy()


class NotStored(ValueError):
    """The file is not laid out as `StoredArrays` reads it."""


_BLOCK = 512
_WORDS = _BLOCK // 8


def block_checksum(numbers: np.ndarray) -> int:
    """Return the CRC-32 of the sums of each 512 bytes, as numbers of 64 bits, and of what is left.

    No change within 8 bytes keeps it, nor blocks that change places. It takes a fifth of the time of a CRC-32 of all.
    """
    content = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    whole = len(content) - len(content) % _BLOCK
    sums = content[:whole].view(np.uint64).reshape(-1, _WORDS).sum(axis=1)
    return zlib.crc32(content[whole:].data, zlib.crc32(sums.data))


FLOAT32, BF16 = 0, 1
"""The kinds of numbers that are read at an offset."""
_DTYPE_OF_KIND = (np.float32, np.uint16)
_BITS_OF_HALF = 16


def _from_bf16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << _BITS_OF_HALF).view(np.float32)


def read_at(path: Path, place: np.ndarray, wanted: Mapping[int, tuple[int, ...]]) -> list[np.ndarray] | None:
    """Return float32 arrays from the offsets of a place that `wanted` names, each of a shape.

    None if an offset is 0, if the file's size or time is not that of `place`, if a checksum is not, or if it is gone.
    That costs a tenth of reading the file with its table, and no more than the bytes of these arrays.
    """
    offsets, checksums, kinds = place["offsets"].tolist(), place["checksums"].tolist(), place["kinds"].tolist()
    arrays = []
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # of a visit: a third of the time of Path.open
            if state_from(os.fstat(file.fileno())) != place["state"].item():
                return None
            for number, shape in wanted.items():
                numbers, offset = np.empty(shape, _DTYPE_OF_KIND[kinds[number]]), offsets[number]
                if not offset or file.seek(offset) != offset or file.readinto(numbers.data.cast("B")) != numbers.nbytes:
                    return None
                if block_checksum(numbers) != checksums[number]:
                    return None
                arrays.append(numbers if kinds[number] == FLOAT32 else _from_bf16(numbers))
    except OSError:  # whoever reads the whole file says why
        return None
    return arrays


def read_arrays(
    path: Path, largest: Mapping[str, int], *, warns: bool = False
) -> tuple[dict[str, np.ndarray], StoredArrays | None]:
    """Return the arrays of a file that `largest` names, each of at most so many bytes, and the file if they are stored.

    With `warns` large ones that it does not name are reported. Raise `ValueError` for one that is larger, and as
    `numpy.load` for what is damaged.
    """
    try:
        stored = StoredArrays.read(path)
        sizes = {name: stored.num_bytes_of(name) for name in stored.names}
        return _known(path, stored, sizes, largest, warns=warns), stored
    except NotStored:  # of another program, or damaged: NumPy reads it, or says what is wrong with it
        with np.load(path, allow_pickle=False) as file:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.zip.infolist()}
            return _known(path, file, sizes, largest, warns=warns), None


def _known(
    path: Path, file: Any, sizes: Mapping[str, int], largest: Mapping[str, int], *, warns: bool
) -> dict[str, np.ndarray]:
    for name in sizes.keys() - largest.keys():
        if warns and sizes[name] > _LARGE_STRANGER:
            log.warning("'%s' holds '%s' of %d MB, which is not read.", path, name, sizes[name] // 10**6)
    names = largest.keys() & sizes.keys()
    for name in names:
        if sizes[name] > largest[name]:  # before it is unpacked
            raise ValueError(f"{name} would take {sizes[name]} bytes")
    return {name: file[name] for name in names}


def num_bytes_at(place: Place) -> int:
    """Return the bytes of the numbers of an array."""
    return math.prod(place.shape) * np.dtype(place.dtype).itemsize


def _members(data: memoryview) -> dict[str, tuple[int, int, int]]:
    """Return start, size and checksum of each member, by its name without .npy."""
    try:
        end = _END.unpack_from(data, len(data) - _END.size)
        if end[0] != b"PK\5\6" or end[-1] != 0:
            raise NotStored("it has another end than NumPy writes")
        at, members = end[6], {}
        for _ in range(end[4]):
            fields = _MEMBER.unpack_from(data, at)
            (signature, _, _, flags, method, _, _, checksum, packed, size, name_bytes, extra, comment) = fields[:13]
            offset = fields[-1]
            if signature != b"PK\1\2" or method != _STORED or packed != size or flags & _IS_ENCRYPTED:
                raise NotStored("it is compressed")
            if _LARGEST_OF_ZIP in (size, offset):
                raise NotStored("it has large members")
            name = bytes(data[at + _MEMBER.size : at + _MEMBER.size + name_bytes]).decode()
            local = _LOCAL.unpack_from(data, offset)
            start = offset + _LOCAL.size + local[-2] + local[-1]
            name_here = bytes(data[offset + _LOCAL.size : offset + _LOCAL.size + local[-2]]).decode()
            if local[0] != b"PK\3\4" or name_here != name or start + size > len(data) or not name.endswith(".npy"):
                raise NotStored("its list of members is not that of the file")
            members[name.removesuffix(".npy")] = start, size, checksum
            at += _MEMBER.size + name_bytes + extra + comment
    except (struct.error, UnicodeDecodeError) as error:
        raise NotStored(str(error)) from error
    if len(members) != end[4]:
        raise NotStored("a member is there twice")
    return members
