"""The sizes of images: each read once, and remembered beside the images where that is asked for."""

import json
import logging
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from library.config.atomic_files import write_text
from library.config.errors import UserError
from library.images.reading import read_size
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

FILE_NAME = "image_sizes.json"


class ImageSizes:
    """Sizes of image files; with `on_disk` those are remembered whose files have the bytes and time they had.

    A folder of images then holds `image_sizes.json`: of each file its width and height, its size in bytes and its
    modification time in nanoseconds.
    """

    def __init__(self, *, on_disk: bool):
        self._on_disk = on_disk
        self._records: dict[Path, dict[str, list[int]]] = {}
        self._changed: set[Path] = set()

    def of(self, image: Path) -> Size:
        """Return the size of an image. Raise `UnusableImage` if it has none."""
        if not self._on_disk:
            return read_size(image)
        folder = image.parent
        if folder not in self._records:
            self._records[folder] = _read(folder / FILE_NAME)
        try:
            state = image.stat()  # before reading: a change in between is noticed by the next start
        except OSError:
            return read_size(image)  # which says what is wrong
        known = self._records[folder].get(image.name)
        if known is not None and known[2:] == [state.st_size, state.st_mtime_ns]:
            return Size(known[0], known[1])
        size = read_size(image)
        self._records[folder][image.name] = [*size, state.st_size, state.st_mtime_ns]
        self._changed.add(folder)
        return size

    def save(self) -> None:
        """Write what is new; a folder that cannot be written to is reported, and read again by the next start."""
        for folder in sorted(self._changed):
            records = self._records[folder]
            there = {name: record for name, record in sorted(records.items()) if (folder / name).is_file()}
            try:
                write_text(folder / FILE_NAME, json.dumps(there) + "\n")
            except UserError as error:
                log.warning("--cache_info: %s", error.problem)
        self._changed.clear()


def _read(path: Path) -> dict[str, list[int]]:
    """Return the records of a file; none where it does not exist or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, JSONDecodeError, RecursionError):  # written again after the images are read
        return {}
    return {name: record for name, record in content.items() if _is_record(record)} if isinstance(content, dict) else {}


def _is_record(record: Any) -> bool:
    return isinstance(record, list) and len(record) == 4 and all(type(n) is int and n >= 0 for n in record)
