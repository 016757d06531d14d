"""One run at a time for each model: a second one would resume from a state that the first is about to replace."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import psutil

from library.config.errors import UserError
from library.config.processes import share_of_process

log = logging.getLogger(__name__)


@contextmanager
def run_lock(output_dir: Path, output_name: str | None, *, doing: str = "training") -> Iterator[None]:
    """Within the block this process is the only one that trains `output_name` into `output_dir`.

    `doing` says what it does there, if it is something else.

    `accelerate launch` returns at once on Ctrl-C while the run is still saving: to resume then would continue from an
    older state. Raise `UserError`, with the number of the process, if another run of this machine holds the lock. Of
    several processes of a run only the first takes it.

    The system releases the lock when the process ends, however it ends: filelock closes it in forked children, such as
    data-loader workers that outlive a killed run.
    """
    if not share_of_process().is_first:
        yield
        return
    path = _lock_file(output_dir, output_name)
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        what = f"into '{output_dir}'" if output_name is None else f"'{output_name}' into '{output_dir}'"
        if doing != "training":
            raise UserError(
                f"process {_holder(path)} is {doing} {output_name or 'files'} in '{output_dir}'.",
                "Wait until it has ended.",
            ) from error
        raise UserError(
            f"process {_holder(path)} is still training {what}, or saving it after it was stopped.",
            "Wait until it has ended, or set another --output_name or --output_dir.",
        ) from error
    except OSError as error:
        log.warning("a second run into '%s' would not be noticed: cannot write '%s' (%s).", output_dir, path, error)
        yield
        return
    try:
        with suppress(OSError):  # without it the other run is not told the number
            path.with_suffix(".pid").write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            path.with_suffix(".pid").unlink()  # while the lock is held: afterwards it may be another run's
        lock.release()


def other_runs(output_dir: Path, output_name: str | None) -> bool:
    """Return whether runs of other names train into `output_dir` on this machine."""
    own = _lock_file(output_dir, output_name).with_suffix(".pid")
    in_same_folder = own.parent.glob(f"{own.name.rpartition('-')[0]}-*.pid")
    return any(psutil.pid_exists(_number(path)) for path in in_same_folder if path != own)


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ends at this moment
        return -1


def _holder(path: Path) -> str:
    try:
        return path.with_suffix(".pid").read_text(encoding="utf-8")
    except OSError:
        return "of unknown number"


def _lock_file(output_dir: Path, output_name: str | None) -> Path:
    """Return a file outside the output folder, where a killed run would leave it behind."""
    user = getattr(os, "getuid", int)()
    folder, name = _digest(user, str(output_dir.resolve())), _digest(output_name)
    return Path(tempfile.gettempdir()) / f"sdxl-run-{folder}-{name}.lock"


def _digest(*meant: int | str | None) -> str:
    return hashlib.sha256(json.dumps(meant).encode()).hexdigest()[:16]
