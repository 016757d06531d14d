"""One run at a time for each model: a second one would resume from a state that the first is about to replace."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from library.config.errors import UserError
from library.config.messages import notify

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCKED_BYTE = 2**20
"""Far behind what the file says, which Windows would otherwise let nobody else read."""


@contextmanager
def sole_run(output_dir: Path, output_name: str | None) -> Iterator[None]:
    """Within the block this process is the one that trains `output_name` into `output_dir`.

    `accelerate launch` ends at once on Ctrl-C while the run that it launched is still saving; whoever resumes then
    would go on from an older state. Raises `UserError` where such a run is under way on this machine. Of a run of
    several processes only the first one takes part.

    The system holds the lock and gives it up with the process, however that ends.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = _lock_file(output_dir, output_name)
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        notify(f"a second run into '{output_dir}' would not be noticed: cannot write '{path}' ({error.strerror}).")
        yield
        return
    with file:
        if not _lock(file):
            file.seek(0)
            what = f"into '{output_dir}'" if output_name is None else f"'{output_name}' into '{output_dir}'"
            raise UserError(
                f"process {file.read()} is still training {what}, or saving it after it was stopped.",
                "Wait until it has ended, or give another --output_name or --output_dir.",
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if os.name != "nt":  # where no file that is open can go
                path.unlink(missing_ok=True)


def _lock_file(output_dir: Path, output_name: str | None) -> Path:
    """Not in the output folder, where a killed run would leave it."""
    user = getattr(os, "getuid", int)()
    meant = json.dumps([user, str(output_dir.resolve()), output_name])
    return Path(tempfile.gettempdir()) / f"sdxl-run-{hashlib.sha256(meant.encode()).hexdigest()[:32]}.lock"


def _lock(file: IO[str]) -> bool:
    """Whether this process has the lock of the file now, and no other one."""
    try:
        if sys.platform == "win32":
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else has it
        return False
    return True
