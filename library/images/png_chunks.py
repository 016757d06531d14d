"""The chunks of a PNG: which are handed to Pillow, and whether any that tells how the image is turned comes late."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AROUND = 12  # bytes of a chunk beside its content: length, name, checksum

_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"})
"""What an image consists of: always handed on, so that damage to it is found."""

_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0")
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_LARGEST_INFLATED = 1 << 20  # what Pillow inflates of a text
_LARGEST_NOTE = 1 << 24


class _Chunk(NamedTuple):
    start: int
    end: int
    name: bytes


class Png(NamedTuple):
    """What of an open PNG is read; `turns_late`: notes that may hold an orientation follow the pixels.

    `lost_notes`: there are such notes, but damaged or too large.
    """

    file: BinaryIO
    turns_late: bool
    lost_notes: bool


def needed_part(file: BinaryIO) -> Png | None:
    """Return the open PNG without the chunks that hold neither pixels nor the way the image is turned.

    Pillow refuses a whole image for a text or a colour profile that is longer than it likes or whose checksum is
    wrong; neither is used here. Notes that may hold an orientation (EXIF, XMP) stay if they are sound and not larger
    than 1 MB inflated, 16 MB as they are. Damage to anything else stays too, for the decoder to find. None if the file
    is no PNG.
    """
    file.seek(0)
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        return None
    pieces = [(0, len(_SIGNATURE))]
    has_pixels = turns_late = lost_notes = False
    for chunk in _chunks(file):
        has_pixels |= chunk.name == b"IDAT"
        if _may_turn(file, chunk):
            is_needed = _is_sound(file, chunk)
            turns_late |= is_needed and has_pixels
            lost_notes |= not is_needed
        else:
            is_needed = chunk.name in _PIXELS or chunk.name[:1].isupper()  # a capital: nobody may leave it out
        if not is_needed:
            pieces.append((chunk.end, chunk.end))
        else:
            pieces[-1] = (pieces[-1][0], chunk.end)
    pieces[-1] = (pieces[-1][0], file.seek(0, io.SEEK_END))
    file.seek(0)
    return Png(file if len(pieces) == 1 else io.BufferedReader(_Pieces(file, pieces)), turns_late, lost_notes)


def _chunks(png: BinaryIO) -> Iterator[_Chunk]:
    """The chunks to the end, or to the first that is no whole chunk."""
    start = len(_SIGNATURE)
    size = png.seek(0, io.SEEK_END)
    while start + _AROUND <= size:
        png.seek(start)
        length, name = struct.unpack(">I4s", png.read(8))
        end = start + length + _AROUND
        if not name.isalpha() or end > size:
            return
        yield _Chunk(start, end, name)
        start = end


def _may_turn(png: BinaryIO, chunk: _Chunk) -> bool:
    """Whether it is a note that may hold an orientation."""
    if chunk.name not in _TEXTS:
        return chunk.name == b"eXIf"
    png.seek(chunk.start + 8)
    return png.read(max(map(len, _TURNING_TEXTS))).startswith(_TURNING_TEXTS)


def _is_sound(png: BinaryIO, note: _Chunk) -> bool:
    """Whether Pillow can read the note."""
    length = note.end - note.start - _AROUND
    if length > _LARGEST_NOTE:
        return False
    png.seek(note.start + 8)
    content = png.read(length)
    if zlib.crc32(content, zlib.crc32(note.name)) != int.from_bytes(png.read(4), "big"):
        return False
    return _inflates(_compressed_part(note.name, content))


def _compressed_part(name: bytes, content: bytes) -> bytes:
    """What of a note is compressed; empty if nothing is."""
    _, _, rest = content.partition(b"\0")
    if name == b"zTXt":
        return rest[1:]
    if name == b"iTXt" and rest[:1] == b"\1":
        return rest[2:].split(b"\0", 2)[-1]
    return b""


def _inflates(compressed: bytes) -> bool:
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(compressed, _LARGEST_INFLATED)
    except zlib.error:
        return False
    return not inflater.unconsumed_tail


class _Pieces(io.RawIOBase):
    """Pieces (start, end) of a file, to be read as if they followed one another."""

    def __init__(self, file: BinaryIO, pieces: list[tuple[int, int]]):
        self._file = file
        self._pieces = pieces
        self._size = sum(end - start for start, end in pieces)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]  # the stubs name a private protocol
        before = 0
        for start, end in self._pieces:
            inside = self._position - before
            if inside < end - start:
                self._file.seek(start + inside)
                count = min(len(buffer), end - start - inside)
                data = self._file.read(count)
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            before += end - start
        return 0
