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
    """The arrays of an `.npz` file that was read whole; `names` are those of its members.

    Raise `NotStored` for a file that is compressed, damaged or laid out in another way than NumPy's `savez` does:
    `numpy.load` reads it, or says what is wrong with it.
    """

    def __init__(self, path: Path):
        with path.open("rb", buffering=0) as file:
            self._data = memoryview(file.readall() or b"")
            state = os.fstat(file.fileno())
        self.num_bytes, self.modified = state.st_size, state.st_mtime_ns
        self._members = _members(self._data)
        if len(self._data) != self.num_bytes:
            raise NotStored("it changes while it is read")

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


def read_arrays(path: Path, largest: Mapping[str, int], *, warns: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of a file that `largest` names, each of at most so many bytes.

    With `warns` large ones that it does not name are reported. Raise `ValueError` for one that is larger, and as
    `numpy.load` for what is damaged.
    """
    try:
        stored = StoredArrays(path)
        return _known(path, stored, {name: stored.num_bytes_of(name) for name in stored.names}, largest, warns=warns)
    except NotStored:  # of another program, or damaged: NumPy reads it, or says what is wrong with it
        with np.load(path, allow_pickle=False) as file:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.zip.infolist()}
            return _known(path, file, sizes, largest, warns=warns)


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
