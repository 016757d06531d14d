"""Write a file completely or not at all: the previous file survives a crash, a kill and a full disk."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from library.config.errors import UserError
from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX, discard_replaced, temporary_path

_PASSING_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "ENOMEM", "ENOBUFS", "EMFILE", "ENFILE", "ENOLCK"),
        *("EAGAIN", "EINTR", "EBUSY", "ETXTBSY", "EDEADLK", "ENOTEMPTY"),
        *("EIO", "EREMOTEIO", "ESTALE", "ENOENT", "ENODEV", "ENOTCONN", "ECONNRESET", "ETIMEDOUT"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
"""What may be over by the next attempt: lack of space or memory, another program, a network or a disk that is away."""

_REMEDIES = {
    errno.ENOSPC: "Free some space on the disk.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EINVAL: "Choose another name: this disk cannot hold it.",
    errno.EILSEQ: "Choose another name: this disk cannot hold it.",
    errno.EFBIG: "Choose a folder on a disk that holds files of this size (FAT32 ends at 4 GB).",
    errno.EACCES: "Choose a folder where you may write; on Windows, close programs that have the file open.",
    errno.EPERM: "Choose a folder where you may write.",
    errno.EROFS: "Choose a folder where you may write.",
    errno.EISDIR: "Choose another name, or move the folder that has it.",
    errno.ENOTDIR: "Choose another folder: a file stands in its place.",
    errno.EEXIST: "Choose another folder: a file stands in its place.",
}


class CannotWrite(UserError):
    """The system refuses to write.

    `is_temporary` says whether a later attempt may succeed: it may on a full disk, never where a name is too long.
    """

    def __init__(self, problem: str, remedy: str, *, is_temporary: bool):
        super().__init__(problem, remedy)
        self.is_temporary = is_temporary


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` if the block succeeds; after any error `path` is unchanged.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed over `path`. Missing
    parent folders are created. Raise `CannotWrite` if the system refuses to write (permissions, full disk, a folder in
    the way, a name that it cannot hold).
    """
    partial = temporary_path(path, PARTIAL_SUFFIX)
    try:
        with _opened_for_writing(path, partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_names(path.parent)
    except OSError as error:
        raise _refusal(f"'{path}'", error) from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


@contextmanager
def replacing_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` if the block succeeds; after any error `folder` is unchanged.

    `marker` is the name of a file in every such folder: an existing folder without it has another purpose and is not
    replaced, and files in it that the new folder does not hold are kept beside it. Raise `CannotWrite` for the first,
    and if the system refuses to write.
    """
    if folder.exists() and not (folder / marker).is_file():
        raise CannotWrite(
            f"'{folder}' exists and is not a folder of the kind to be written there.",
            "Choose another output name, or move it.",
            is_temporary=False,
        )
    unfinished = temporary_path(folder, PARTIAL_SUFFIX)
    replaced = temporary_path(folder, REPLACED_SUFFIX)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that had our number before us
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        _flush_names(folder.parent)
        if replaced.exists():
            with suppress(OSError):  # in use by another program: the next start removes it
                discard_replaced(replaced, folder)
    except CannotWrite as error:  # a file in it
        raise _refusal(f"the folder '{folder}'", error.__cause__ or error, error) from error
    except OSError as error:
        raise _refusal(f"the folder '{folder}'", error) from error
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)


def new_folder(parent: Path, prefix: str) -> Path:
    """Make a folder with a name that nobody has. Raise `CannotWrite` if the system refuses."""
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise _refusal(f"in '{parent}'", error) from error


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
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CannotWrite(
            f"cannot write '{path}': character {error.start + 1} of its text is half of one, which UTF-8 cannot hold.",
            "Correct the text.",
            is_temporary=False,
        ) from error
    with replacing(path) as file:
        file.write(data)


def _opened_for_writing(path: Path, partial: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return partial.open("wb")
    except ValueError as error:  # a NUL or half of a character in the name
        raise CannotWrite(f"cannot write '{path}': {error}.", "Choose another name.", is_temporary=False) from error


def _refusal(what: str, error: BaseException, of_file: CannotWrite | None = None) -> CannotWrite:
    """The error that says why `what` cannot be written; `of_file` is what was said of a file in it."""
    if not isinstance(error, OSError):
        assert of_file is not None
        return CannotWrite(f"cannot write {what}: {error}.", of_file.remedy, is_temporary=of_file.is_temporary)
    # Windows denies access to files that another program has open, too.
    is_temporary = error.errno in _PASSING_ERRORS or (os.name == "nt" and error.errno == errno.EACCES)
    remedy = _REMEDIES.get(error.errno or 0, "Check that the folder is there, and its disk.")
    return CannotWrite(f"cannot write {what}: {error.strerror or error}.", remedy, is_temporary=is_temporary)


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
