"""One run at a time for each model: a second one would resume from a state that the first is about to replace."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from library.config.errors import UserError
from library.config.notices import notify
from library.config.output_files import CannotWrite, write_text


@contextmanager
def sole_run(output_dir: Path, output_name: str | None) -> Iterator[None]:
    """Within the block this process is the one that trains `output_name` into `output_dir`.

    `accelerate launch` ends at once on Ctrl-C while the run that it launched is still saving; whoever resumes then
    would go on from an older state. Raises `UserError` where such a run is under way on this machine. Of a run of
    several processes only the first one takes part.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    note = _note(output_dir, output_name)
    other = _process_of(note)
    if other is not None and other != os.getpid():
        what = "" if output_name is None else f" '{output_name}'"
        raise UserError(
            f"process {other} is still training{what} into '{output_dir}', or saving it after it was stopped.",
            "Wait until it has ended, or give another --output_name or --output_dir.",
        )
    try:
        write_text(note, json.dumps([os.getpid(), psutil.Process().create_time()]))
    except CannotWrite as error:
        notify(f"a second run into '{output_dir}' would not be noticed: {error}")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _note(output_dir: Path, output_name: str | None) -> Path:
    """Where the run says which process it is: not in the output folder, so that a killed run leaves nothing there."""
    user = getattr(os, "getuid", int)()
    meant = json.dumps([user, str(output_dir.resolve()), output_name])
    return Path(tempfile.gettempdir()) / f"sdxl-run-{hashlib.sha256(meant.encode()).hexdigest()[:32]}.json"


def _process_of(note: Path) -> int | None:
    """The process that the note names, if that still lives and is no other one that was given its number since."""
    try:
        process, created = json.loads(note.read_text(encoding="utf-8"))
        return process if psutil.Process(process).create_time() == created else None
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError):  # the last for a note that a power cut has emptied
        return None
