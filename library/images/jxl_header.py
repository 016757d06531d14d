"""How large a JPEG XL image says it is: its decoder asks the system for all the memory first, and dies without it."""

import struct
from typing import BinaryIO

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_HEADER_BYTES = 16  # the sizes end in the tenth
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def declared_pixels(file: BinaryIO) -> int:
    """Return how many pixels an open JPEG XL file declares, 0 for any other file (ISO/IEC 18181-1, SizeHeader)."""
    header = _codestream(file)
    if not header.startswith(_CODESTREAM):
        return 0
    bits = _Bits(header[len(_CODESTREAM) :].ljust(_HEADER_BYTES, b"\0"))
    is_small = bits.take(1)
    height = _side(bits, is_small)
    ratio = bits.take(3)
    if ratio == 0:
        return height * _side(bits, is_small)
    across, down = _RATIOS[ratio - 1]
    return height * (height * across // down)


class _Bits:
    """Numbers of so many bits each, lowest bit first."""

    def __init__(self, data: bytes):
        self._rest = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._rest & ((1 << count) - 1)
        self._rest >>= count
        return value


def _side(bits: _Bits, is_small: int) -> int:
    if is_small:
        return (bits.take(5) + 1) * 8
    return bits.take(_SIDE_BITS[bits.take(2)]) + 1


def _codestream(file: BinaryIO) -> bytes:
    """The beginning of the compressed image: of the file, or of the first box of a container that holds it."""
    file.seek(0)
    start = file.read(len(_CONTAINER))
    if start != _CONTAINER:
        return (start + file.read(_HEADER_BYTES))[:_HEADER_BYTES]
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        around = 8
        if length == 1:
            length, around = int.from_bytes(file.read(8), "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return file.read(_HEADER_BYTES + 4)[4 if kind == b"jxlp" else 0 :]
        if length < around:
            break
        file.seek(length - around, 1)
    return b""
