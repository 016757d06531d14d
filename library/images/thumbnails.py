"""Small versions of images, made once and kept in a folder that is not the set's."""

import io
import logging
import os
import threading
from pathlib import Path

from library.config.digests import digest
from library.config.leftovers import PARTIAL_SUFFIX, temporary_path

log = logging.getLogger(__name__)

_QUALITY = 85
_NEAR_ENOUGH = 0.9
"""A JPEG that is reduced to no less than this part of a thumbnail while it is decoded need not be larger."""
_JPEG_END = b"\xff\xd9"
_LARGEST_FOLDER = 2 << 30
_KEPT_OF_IT = 1 << 30


def thumbnail(image: Path, edge: int, folder: Path) -> bytes:
    """Return a JPEG of an image, upright and on white, of at most `edge` pixels a side.

    It is kept in `folder` under a name that path, size, time and edge decide. Raise `UnusableImage`.
    """
    file = folder / thumbnail_name(image, edge)
    try:
        content = file.read_bytes()
        if content.endswith(_JPEG_END):  # a crash may leave an empty file
            return content
    except OSError:
        pass  # not made yet
    from library.images.reading import load_rgb  # and numpy, which the first page need not wait for

    made = io.BytesIO()
    reduced = load_rgb(image, int(edge * _NEAR_ENOUGH))
    reduced.thumbnail((edge, edge), reducing_gap=1.0)  # 2 ms instead of 14 for 1024 pixels
    reduced.save(made, "JPEG", quality=_QUALITY)
    content = made.getvalue()
    partial = temporary_path(file, PARTIAL_SUFFIX).with_suffix(f".{threading.get_ident()}{PARTIAL_SUFFIX}")
    try:  # without waiting for the disk, which would take longer than the image
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:  # a full disk: it is made again the next time
        log.debug("cannot keep a thumbnail: %s", error)
    return content


def thumbnail_name(image: Path, edge: int) -> str:
    """Return under which name the thumbnail of an image is kept, as it is now; of one that is gone, any."""
    try:
        state = image.stat()
        version = f"{state.st_size} {state.st_mtime_ns}"
    except OSError:
        version = "gone"
    name = digest([f"{edge} {version} {image.absolute()}".encode(errors="surrogatepass")], 16).hex()
    return f"{name[:2]}/{name[2:]}.jpg"


def remove_old_thumbnails(folder: Path, largest: int = _LARGEST_FOLDER, kept: int = _KEPT_OF_IT) -> int:
    """Remove the oldest thumbnails of a folder that has become too large; return how many."""
    files = []
    for path in folder.glob("??/*.jpg"):
        try:
            state = path.stat()
        except OSError:
            continue
        files.append((state.st_mtime, state.st_size, path))
    total, num_removed = sum(size for _, size, _ in files), 0
    if total <= largest:
        return 0
    for _, size, path in sorted(files):
        if total <= kept:
            break
        try:
            os.unlink(path)  # noqa: PTH108
        except OSError:
            continue
        total -= size
        num_removed += 1
    return num_removed
