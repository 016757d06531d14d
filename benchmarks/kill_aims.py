"""Kill the processes of a run: inside a write, just before a file operation, or after a while."""

import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX
from tests.forked_runs import FOLDER, KILL_AT, ForkedRun

LAST_SECONDS = 20.0
"""How long the other process of a run may take to notice that one was killed; then it is killed, as a launcher does."""
_POLL_SECONDS = 0.0005
_PHASE_OF_SUFFIX = {".npz": "latents", ".safetensors": "model or text", ".png": "image", ".json": "metadata"}

Start = Callable[[Mapping[str, str]], Sequence[ForkedRun]]
"""Starts the processes of a run; the environment given is that of the first."""


@dataclass(frozen=True)
class Kill:
    """One kill: how it was aimed, and which phase it hit, as far as the files it left tell."""

    script: str
    aim: str
    phase: str


@dataclass(frozen=True)
class Range:
    """Up to where kills of a script are aimed: its temporary files, its file operations, its seconds."""

    num_writes: int
    num_operations: int
    seconds: float


RANGES = {"prepare": Range(4, 16, 3.0), "train": Range(12, 160, 6.0)}


def start_and_kill(start: Start, folder: Path, within: Range, chance: random.Random) -> tuple[str, Sequence[ForkedRun]]:
    """Start a run that writes into `folder` and kill one of its processes; return the aim, and the processes, ended.

    A run can be over before the moment that was aimed at.
    """
    kind = chance.choice(["write", "write", "operation", "time"])
    if kind == "operation":
        number = chance.randrange(1, within.num_operations)
        runs = start({KILL_AT: str(number), FOLDER: str(folder)})
        aim = f"before file operation {number}"
        while not any(run.is_over() for run in runs):
            time.sleep(_POLL_SECONDS)
    else:
        runs = start({})
        victim = chance.choice(runs)
        if kind == "write":
            number, delay = chance.randrange(1, within.num_writes), chance.uniform(0, 0.03)
            aim = f"{1000 * delay:.0f} ms after temporary file {number} appeared"
            wait_for_temporary_file(folder, number, victim)
            time.sleep(delay)
        else:
            seconds = chance.uniform(0.2, within.seconds)
            aim = f"after {seconds:.2f} s"
            victim.wait_or_go_on(seconds)
        _kill(victim)
        aim += "" if victim is runs[0] else ", the second process"
    for run in runs:
        if not run.wait_or_go_on(LAST_SECONDS):
            _kill(run)
    return aim, runs


def _kill(run: ForkedRun) -> None:
    """Kill a process, which may have ended in this moment."""
    if not run.is_over():
        with suppress(ProcessLookupError):
            run.send(signal.SIGKILL)


def wait_for_temporary_file(folder: Path, number: int, run: ForkedRun) -> None:
    """Wait until `number` temporary files and folders have appeared in `folder`, or until the run is over."""
    seen: set[str] = set()
    while len(seen) < number and not run.is_over():
        for place, folders, files in os.walk(folder):
            seen |= {f"{place}/{name}" for name in (*folders, *files) if name.endswith(PARTIAL_SUFFIX)}
        time.sleep(_POLL_SECONDS)


def phase_of(folder: Path, said: str) -> str:
    """Return what a killed process was doing, as far as the files it left tell."""
    for path in folder.rglob("*"):
        if path.suffix == REPLACED_SUFFIX:
            return "renaming a folder"
        if path.suffix == PARTIAL_SUFFIX and path.is_dir():
            return f"state, {len(list(path.iterdir()))} files begun"
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        return _PHASE_OF_SUFFIX.get(Path(path.stem).with_suffix("").suffix, path.name)
    return "between two files" if "%|" in said else "start"  # a progress bar has been shown
