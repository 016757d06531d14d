"""Write a file whole or not at all: what the user had before survives a crash, a kill and a full disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from library.config.errors import UserError

PARTIAL_SUFFIX = ".partial"


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


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 (line ends as given), whole or not at all; raises as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
