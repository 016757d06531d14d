"""Whether an image file ends as files of its format do: one that was cut short does not."""

import os
from collections.abc import Callable
from typing import BinaryIO

_HEAD_BYTES = 16
_TAIL_BYTES = 4096
"""How far before the end of a file the end of the image is looked for; some programs append notes."""
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_GIF_END = b";"


def seems_whole(file: BinaryIO) -> bool:
    """Return whether the end of a PNG, JPEG, GIF, WebP, BMP, AVIF or HEIF is there; true for other formats.

    It costs two short reads. A file without the end can hold the image all the same: decoding it tells.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    file.seek(max(0, num_bytes - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if head[4:8] == b"ftyp":
        return _boxes_fit(file, num_bytes)
    for is_format, is_whole in _FORMATS:
        if is_format(head):
            return is_whole(head, tail, num_bytes)
    return True


def _boxes_fit(file: BinaryIO, num_bytes: int) -> bool:
    """Walk the boxes of an ISO media file (AVIF, HEIF), each of which begins with its length."""
    place = 0
    while place + 8 <= num_bytes:
        file.seek(place)
        header = file.read(_HEAD_BYTES)
        length = int.from_bytes(header[:4], "big")
        if length == 0:  # up to the end of the file
            return True
        if length == 1:  # a long box
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            return False
        place += length
    return place == num_bytes


_Check = Callable[[bytes, bytes, int], bool]
_FORMATS: tuple[tuple[Callable[[bytes], bool], _Check], ...] = (
    (lambda head: head.startswith(b"\x89PNG"), lambda head, tail, size: _PNG_END in tail),
    (lambda head: head.startswith(b"\xff\xd8"), lambda head, tail, size: _JPEG_END in tail),
    (lambda head: head.startswith(b"GIF8"), lambda head, tail, size: tail.rstrip(b"\0").endswith(_GIF_END)),
    (
        lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP",
        lambda head, tail, size: int.from_bytes(head[4:8], "little") + 8 <= size,
    ),
    (lambda head: head.startswith(b"BM"), lambda head, tail, size: int.from_bytes(head[2:6], "little") <= size),
)
"""How a format is known by its first bytes, and whether its end is there: by first and last bytes, and size."""
