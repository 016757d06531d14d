"""Write a file completely or not at all: the previous file survives a crash, a kill and a full disk."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from library.config.errors import UserError

log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"


class CannotWrite(UserError):
    """The system refuses to write: permissions, a full disk, something in the way. A later attempt may succeed."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` if the block succeeds; after any error `path` is unchanged.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed over `path`. Missing
    parent folders are created. Raise `CannotWrite` if the system refuses to write (permissions, full disk, a folder in
    the way).
    """
    partial = _temporary(path, PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_names(path.parent)
    except OSError as error:
        raise CannotWrite(
            f"cannot write '{path}': {error.strerror or error}.",
            "Check that the folder exists, that you may write there and that the disk is not full.",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def replacing_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` if the block succeeds; after any error `folder` is unchanged.

    `marker` is the name of a file in every such folder: an existing folder without it has another purpose and is not
    replaced. Raise `CannotWrite` for that, and if the system refuses to write.
    """
    if folder.exists() and not (folder / marker).is_file():
        raise CannotWrite(
            f"'{folder}' exists and is not a folder of the kind to be written there.",
            "Choose another output name, or move it.",
        )
    unfinished = _temporary(folder, PARTIAL_SUFFIX)
    replaced = _temporary(folder, REPLACED_SUFFIX)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        _flush_names(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, CannotWrite) as error:
        reason = error if isinstance(error, OSError) else error.__cause__  # a file in it could not be written
        raise CannotWrite(
            f"cannot write the folder '{folder}': {getattr(reason, 'strerror', None) or reason}.",
            "Check that you may write there, that the disk is not full and that no program has its files open.",
        ) from error
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_leftovers(folder: Path, *, recursive: bool = False) -> list[Path]:
    """Remove what killed writers left in `folder`, and report it; return what was removed.

    Call it before this process writes there. Names contain the id of the process that was writing: files of processes
    that still run are kept. A folder that was moved aside, whose complete successor was not yet in place, is put back.
    """
    pattern = "**/*" if recursive else "*"
    found = [path for suffix in (PARTIAL_SUFFIX, REPLACED_SUFFIX) for path in folder.glob(pattern + suffix)]
    removed = []
    for path in sorted(found):
        name, _, process = path.stem.rpartition(".")
        if not process.isdecimal() or _is_being_written(path, int(process)):
            continue
        original = path.with_name(name)
        try:
            if path.suffix == REPLACED_SUFFIX and not original.exists():
                path.rename(original)
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            log.warning("'%s' is left over and cannot be removed: %s", path, error.strerror or error)
            continue
        removed.append(path)
    if removed:
        log.warning("removed %d unfinished files that a killed run left in '%s'", len(removed), folder)
    return removed


def require_disk_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if the disk of `folder` has less than `needed` bytes free; `what` names what needs them."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of '{folder}' has {_size(free)} free, and {what} takes {_size(needed)}: "
            f"{_size(needed - free)} are missing.",
            "Free some space, or choose a folder on another disk.",
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with its line ends unchanged, completely or not at all. Raise as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}{suffix}")


def _is_being_written(path: Path, process: int) -> bool:
    """Return whether the process that wrote `path` still runs; its id may belong to another process by now."""
    if process == os.getpid():
        return False
    try:
        return psutil.Process(process).create_time() <= path.stat().st_mtime
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # a process of another user, about which nothing more is known
        return True


def _flush_names(folder: Path) -> None:
    """Flush the names of a folder to the disk: without that a rename may not survive a power failure."""
    if os.name == "nt":
        return  # a folder cannot be opened there, and the file system's journal holds the rename
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
