"""What the files of latents hold, remembered beside the metadata: files of known size and time need not be read."""

import json
import logging
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.config.atomic_files import replacing
from library.config.errors import UserError
from library.data.columns import Texts
from library.data.file_states import STATE
from library.data.subsets import Subset

log = logging.getLogger(__name__)

SUFFIX = ".index"
_FORMAT = 1
_ABOUT, _COLUMNS = "about.json", ("entries", "names", "ends")
_LOCK = "lock"
_LONGEST_WAIT_S = 300
_OURS = re.compile(rf"(?:{'|'.join(_COLUMNS)})-\d+")
SETTLED_NS = 2_000_000_000
"""A file that was written so shortly before it was read may be written again without another time (2 s on FAT)."""

CONTENT_BYTES = 32

FACTS = np.dtype(
    [
        *[(name, np.int32, 2) for name in ("latents", "original", "resized")],
        ("crop", np.float64, 4),
        *[(name, np.int32) for name in ("vae", "interpolation", "has_flipped", "has_mask", "is_ours")],
    ]
)
"""What many files have in common: sizes are (width, height), of the latents in cells, and (0, 0) for none; `vae` and
`interpolation` number texts of the index."""

PLACE = np.dtype([("state", STATE), ("offsets", np.int64, 3), ("checksums", np.uint32, 3), ("kinds", np.uint8, 3)])
"""The state of a file, where in it latents, flipped latents and mask begin (0: unknown), their `block_checksum`, and
what kind of numbers they are."""

ENTRY = np.dtype(
    [
        ("facts", FACTS),
        ("place", PLACE),
        ("image", STATE),
        ("mask", STATE),
        ("seen", np.int64),
        ("content", f"S{CONTENT_BYTES}"),
        ("mask_content", f"S{CONTENT_BYTES}"),
    ]
)
"""What is known of a file of latents, of its image and its mask, when it was read, and the digests of what it was made
from."""


class LatentIndex(NamedTuple):
    """Entries of files by name: relative to the folder of the images where they lie in it.

    Entries that are read from a file are mapped: what is written into them stays in memory.
    """

    names: Texts
    entries: np.ndarray
    texts: tuple[str, ...]

    def rows_of(self, names: Texts) -> np.ndarray:
        """Return the row of each name, -1 for one that is not there."""
        if names == self.names:
            return np.arange(len(names))
        row_of = {name: row for row, name in enumerate(self.names)}
        return np.fromiter((row_of.get(name, -1) for name in names), np.int64, len(names))


EMPTY = LatentIndex(Texts.of([]), np.zeros(0, ENTRY), ())


def index_path(subset: Subset) -> Path:
    """Return the folder of the index of a subset: beside its metadata, or in its folder of images."""
    if subset.metadata_file is not None:
        return index_beside(subset.metadata_file)
    return subset.image_dir / f".latents{SUFFIX}"


def settled(entries: np.ndarray) -> np.ndarray:
    """Return which entries are of files that were old enough, when they were read, to have another time if changed."""
    times = [entries["place"]["state"]["modified"], entries["image"]["modified"], entries["mask"]["modified"]]
    return np.maximum.reduce(times) < entries["seen"] - SETTLED_NS


def now_ns() -> int:
    """Return the time as files have it."""
    return time.time_ns()


def read_index(folder: Path) -> LatentIndex:
    """Return the index in a folder; an empty one where there is none, or (reported) where it is damaged."""
    if not (folder / _ABOUT).exists() and not any(_OURS.fullmatch(path.stem) for path in folder.glob("*.npy")):
        return EMPTY
    described = ""
    try:
        described = (folder / _ABOUT).read_text(encoding="utf-8")
        about = json.loads(described)
        if about["format"] != _FORMAT:
            raise ValueError("it is of another version of this program")
        entries, block, ends = (
            np.load(folder / f"{name}-{about['number']}.npy", mmap_mode="c", allow_pickle=False) for name in _COLUMNS
        )
        for name, column in zip(_COLUMNS, (entries, block, ends), strict=True):
            if _checksum(column) != about["checksums"][name]:
                raise ValueError(f"{name} are not as they were written")
        if not (entries.dtype == ENTRY and block.dtype == np.uint8 and ends.dtype == np.int64):
            raise ValueError("its columns are others")
        if not len(ends) - 1 == len(entries) or ends[0] != 0 or ends[-1] != len(block) or (np.diff(ends) < 0).any():
            raise ValueError("its columns do not go together")
        return LatentIndex(Texts(block, ends), entries, tuple(map(str, about["texts"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        if described and _is_replaced(folder / _ABOUT, described):
            return read_index(folder)
        log.warning("the index '%s' cannot be used (%s): the latents are read, and it is made again", folder, error)
        return EMPTY


def _is_replaced(path: Path, content: str) -> bool:
    """Return whether a file that was just read holds something else by now: another process has written it."""
    try:
        return path.read_text(encoding="utf-8") != content
    except (OSError, ValueError):
        return False


@contextmanager
def one_writer(folder: Path) -> Iterator[bool]:
    """Within the block no other process of this machine writes the index; tell whether that could be reached.

    Another one is waited for, for some minutes. Where no lock can be made, writing fails too, and says so.
    """
    import filelock  # which those that only read need not wait for

    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / _LOCK, timeout=_LONGEST_WAIT_S)
    try:
        lock.acquire()
    except filelock.Timeout:
        log.warning("another process has been writing the index '%s' for long: this one does not write it", folder)
        yield False
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


def _checksum(column: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(column).view(np.uint8).data)


def write_index(folder: Path, names: Sequence[str] | Texts, entries: np.ndarray, texts: Sequence[str]) -> None:
    """Write an index, whole or not at all. A folder that cannot be written to is reported: the next start reads again.

    Columns of another number are those of the index before, which a process may still have mapped.
    """
    column = names if isinstance(names, Texts) else Texts.of(names)
    columns = dict(zip(_COLUMNS, (np.asarray(entries, ENTRY), column.block, column.ends), strict=True))
    number = now_ns()
    about = {
        "format": _FORMAT,
        "number": number,
        "texts": list(texts),
        "checksums": {name: _checksum(each) for name, each in columns.items()},
    }
    try:
        for name, each in columns.items():
            with replacing(folder / f"{name}-{number}.npy") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(each), allow_pickle=False)
        with replacing(folder / _ABOUT) as file:
            file.write(json.dumps(about).encode())
    except UserError as error:
        log.warning("the index of latents: %s It is made again at the next start.", error.problem)
        return
    for old in folder.glob("*.npy"):
        if _OURS.fullmatch(old.stem) and not old.stem.endswith(f"-{number}"):
            with suppress(OSError):  # mapped by another process (Windows); removed by the next that writes
                old.unlink()


def index_beside(metadata_file: Path) -> Path:
    """Return the folder of the index of a metadata file."""
    return metadata_file.with_name(metadata_file.name + SUFFIX)


def with_entries(
    index: LatentIndex, names: Sequence[str], entries: np.ndarray, texts: Sequence[str]
) -> tuple[Texts, np.ndarray]:
    """Return names and entries of an index with new ones in it, whose numbers of `texts` extend those of the index."""
    assert tuple(texts[: len(index.texts)]) == index.texts
    rows = index.rows_of(Texts.of(names))
    is_new = rows < 0
    merged = np.concatenate([index.entries, entries[is_new]])
    merged[rows[~is_new]] = entries[~is_new]
    added = [name for name, new in zip(names, is_new, strict=True) if new]
    return Texts.joined([index.names, Texts.of(added)]) if added else index.names, merged
