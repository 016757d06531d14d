"""Files in the output folder by which a user asks running runs for something: to stop, to save."""

import logging
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from library.config.atomic_files import write_text

log = logging.getLogger(__name__)


@dataclass
class RequestFile:
    """A file named `file_name` asks every run of its folder; with a dash and a run's name behind it only that run.

    `has_company()` says whether other runs train into the same folder: they have to see the file, too.
    """

    output_dir: Path
    output_name: str | None
    file_name: str
    has_company: Callable[[], bool] = bool
    _seen: tuple[int, int] | None = field(default=None, init=False)

    def is_made(self) -> bool:
        """Return whether there is a file not seen before; remove it once every run has seen it."""
        is_made = False
        if self._own is not None and self._own.is_file():
            is_made = True
            _unlink(self._own)
        written = _written(self._shared)
        if written is not None and written != self._seen:
            is_made, self._seen = True, written
            if not self.has_company():
                _unlink(self._shared)
        return is_made

    def discard_earlier(self) -> None:
        """Remove the files that were meant for an earlier run; one that other runs have to see is not counted."""
        self._seen = _written(self._shared)
        for file in (self._own, None if self.has_company() else self._shared):
            if file is not None and file.is_file():
                log.info("removed '%s', which was meant for an earlier run", file)
                _unlink(file)

    @property
    def _shared(self) -> Path:
        return self.output_dir / self.file_name

    @property
    def _own(self) -> Path | None:
        return None if self.output_name is None else self.output_dir / f"{self.file_name}-{self.output_name}"


def make_request(output_dir: Path, output_name: str | None, file_name: str) -> Path:
    """Ask the run of a name for what `file_name` asks for; without a name every run of the folder. Return the file.

    Raise `CannotWrite` where it cannot be written.
    """
    file = output_dir / (file_name if output_name is None else f"{file_name}-{output_name}")
    write_text(file, "")
    return file


def _written(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from another that is written there later; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _unlink(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
