"""Write a file whole or not at all: what the user had before survives a crash, a kill and a full disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from psutil import pid_exists

from library.config.errors import UserError

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well; after any error `path` is as it was.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed over `path`. Missing
    parent folders are made. Raises `UserError` where the system refuses to write (rights, full disk, folder in the
    way).
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': {error.strerror or error}.",
            "Check that the folder exists, that you may write there and that the disk is not full.",
        ) from error
    finally:
        if partial.exists():
            partial.unlink()


@contextmanager
def replacing_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends well; after any error that is as it was.

    `marker` is the name of a file that such folders hold: an existing folder without it is somebody else's and is not
    replaced. Raises `UserError` for that, and where the system refuses to write.
    """
    if folder.exists() and not (folder / marker).is_file():
        raise UserError(
            f"'{folder}' exists and is something else than what is to be written there.",
            "Choose another output name, or move it.",
        )
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    replaced = folder.with_name(f"{folder.name}.{os.getpid()}{REPLACED_SUFFIX}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the folder '{folder}': {error.strerror or error}.",
            "Check that you may write there, that the disk is not full and that no program has its files open.",
        ) from error
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what writers that were killed have left in `folder`; gives what was removed.

    Names carry the number of the process that was writing: those of processes that still run are left alone. A folder
    that was moved aside when its successor was complete but not yet in place is put back.
    """
    removed = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        name, _, process = path.stem.rpartition(".")
        if path.suffix not in (PARTIAL_SUFFIX, REPLACED_SUFFIX) or not process.isdecimal() or pid_exists(int(process)):
            continue
        original = path.with_name(name)
        if path.suffix == REPLACED_SUFFIX and not original.exists():
            path.rename(original)
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        removed.append(path)
    return removed


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 (line ends as given), whole or not at all; raises as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
