"""Where a caption lies, a file or an entry of metadata: its bytes, read and written under a lock."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from library.config.atomic_files import replacing
from library.config.digests import digest
from library.config.errors import UserError
from library.data.metadata import TAGS, Entry, Metadata, read_metadata, write_metadata

ABSENT = "absent"
"""The tag of a caption that does not exist."""

LARGEST_CAPTION = 1 << 20
"""Bytes; a larger file is taken for something else."""

_NUM_LOCKS = 256
_LOCK_SECONDS = 10.0


class Place(NamedTuple):
    """Where a caption lies: in a file, or under `name` in the entry `key` of a metadata file."""

    path: Path
    key: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}, image {self.key}, {self.name}"


def read_place(place: Place) -> bytes | None:
    """Return the bytes of a caption; None if it does not exist. Raise `UserError` if it cannot be read."""
    if place.key is not None:
        return _entry_content(read_metadata(place.path).get(place.key), place)
    try:
        with place.path.open("rb") as file:
            content = file.read(LARGEST_CAPTION + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read '{place.path}': {reason}.", "Check the file.") from error
    if len(content) > LARGEST_CAPTION:
        raise UserError(f"'{place.path}' is larger than 1 MiB, which no caption is.", "Move the file elsewhere.")
    return content


def read_places(places: Iterable[Place]) -> dict[Place, bytes | UserError | None]:
    """Return what `read_place` does for each, or the error; a metadata file is read once."""
    metadata: dict[Path, Metadata | UserError] = {}
    contents: dict[Place, bytes | UserError | None] = {}
    for place in places:
        try:
            if place.key is None:
                contents[place] = read_place(place)
                continue
            if place.path not in metadata:
                metadata[place.path] = read_metadata(place.path)
            entries = metadata[place.path]
            contents[place] = (
                entries if isinstance(entries, UserError) else _entry_content(entries.get(place.key), place)
            )
        except UserError as error:
            contents[place] = error
            if place.key is not None:
                metadata[place.path] = error
    return contents


def tag_of(content: bytes | None) -> str:
    """Return what tells this content from others."""
    return ABSENT if content is None else digest([content], 12).hex()


def write_file(path: Path, content: bytes | None) -> None:
    """Write a caption file completely or not at all, or remove it. Raise `UserError` where the system refuses."""
    if content is not None:
        if not path.parent.is_dir():
            raise UserError(f"the folder '{path.parent}' is gone.", "Bring it back; nothing was written.")
        with replacing(path) as file:
            file.write(content)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove '{path}': {error.strerror or error}.", "Check the file.") from error


def write_entries(path: Path, contents: Mapping[Place, tuple[bytes | None, bytes | None]]) -> list[Place]:
    """Write captions of a metadata file, each from what it has to be now to what it shall be; return those that differ.

    They stay as they are. Raise `UserError` for a file that cannot be read or written.
    """
    metadata = read_metadata(path)
    conflicts = []
    for place, (before, after) in contents.items():
        assert place.key is not None and place.name is not None
        entry = metadata.get(place.key)
        if entry is None or _entry_content(entry, place) != before:
            conflicts.append(place)
        elif after is None:
            entry.pop(place.name, None)
        else:
            entry[place.name] = _entry_value(entry.get(place.name), after, place)
    if len(conflicts) < len(contents):
        write_metadata(path, metadata)
    return conflicts


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads that lock `path` out of it. Raise `UserError` after ten seconds in vain."""
    number = int.from_bytes(digest([os.path.normpath(path.absolute()).encode(errors="surrogatepass")], 2), "big")
    lock = FileLock(_lock_folder() / f"{number % _NUM_LOCKS}.lock")
    try:
        with lock.acquire(timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise UserError(f"another program keeps '{path}' locked.", "Close it, and try again.") from error


def _lock_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"sdxl-two-captions-locks-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _entry_content(entry: Entry | None, place: Place) -> bytes | None:
    value = None if entry is None else entry.get(place.name or "")
    if value is None:
        return None
    joined = value if isinstance(value, str) else (", " if place.name == TAGS else "\n").join(value)
    return joined.encode("utf-8", errors="surrogatepass")


def _entry_value(old: object, content: bytes, place: Place) -> str | list[str]:
    text = content.decode("utf-8", errors="surrogatepass")
    return text.split("\n") if isinstance(old, list) and place.name != TAGS else text
