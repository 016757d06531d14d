"""Runs below some folders: found by their records, and those that were started and have none yet."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.digests import digest
from library.runs.launch import LAUNCH_FOLDER, Launch, find_launches
from library.runs.log import last_words, read_log_end
from library.training.run_record import FAILED, RECORD_FOLDER, RunRecord, read_records

STARTING = "starts"
"""The state of a run that is not at its first step yet."""
_MOST_LEVELS = 6
_SECONDS_BETWEEN_WALKS = 5.0


@dataclass(frozen=True)
class FoundRun:
    """A run in an output folder: what it has recorded, and how it was started, where `launch` has done that.

    One of the two is there. `records` are those of all runs in the folder.
    """

    output_dir: Path
    record: RunRecord | None
    launches: Sequence[Launch] = ()
    records: Sequence[RunRecord] = ()

    @property
    def name(self) -> str:
        """The name of its record, or of its launch."""
        return self.launches[-1].name if self.record is None else self.record.name

    @property
    def output_name(self) -> str | None:
        """The name of its models."""
        return self.launches[-1].output_name if self.record is None else self.record.output_name

    @property
    def id(self) -> str:
        """What tells the run from all others: letters and digits."""
        return run_id(self.output_dir, self.name)

    @property
    def ids(self) -> list[str]:
        """All that it was called since it was started."""
        return [self.id, *(run_id(self.output_dir, each.name) for each in self.launches)]

    @property
    def state(self) -> str:
        """How the run stands."""
        if self.launches and self.launches[-1].start.is_running and not self._has_begun:
            return STARTING
        return FAILED if self.record is None else self.record.state

    @property
    def log_file(self) -> Path | None:
        """What it has printed, where that was kept."""
        return self.launches[-1].log_file(self.output_dir) if self.launches else None

    @property
    def message(self) -> str:
        """Why it has ended, if that is known."""
        if self.record is not None and self._has_begun:
            return "" if self.record.end is None else self.record.end.message
        if self.log_file is None or self.state == STARTING:
            return ""
        try:
            return last_words(read_log_end(self.log_file, 100).lines)
        except OSError as error:
            return f"its log cannot be read ({error.strerror or error})"

    @property
    def _has_begun(self) -> bool:
        """Whether the last start is in the record."""
        if self.record is None:
            return False
        return not self.launches or any(self.launches[-1].start.is_of_process(each) for each in self.record.starts)


def runs_in(output_dir: Path) -> tuple[list[FoundRun], list[str]]:
    """Return the runs in an output folder, oldest first, and what is wrong with records that cannot be read."""
    records, problems = read_records(output_dir)
    launches = find_launches(output_dir)
    of_record: dict[str, list[Launch]] = {record.name: [] for record in records}
    alone: list[Launch] = []
    for launch in launches:
        owner = next(
            (record for record in records if any(launch.start.is_of_process(each) for each in record.starts)), None
        )
        if owner is None and launch.options.get("resume") is not None:  # it has not come to its first step
            owner = next((each for each in reversed(records) if each.output_name == launch.output_name), None)
        (alone if owner is None else of_record[owner.name]).append(launch)
    found = [FoundRun(output_dir, record, tuple(of_record[record.name]), records) for record in records]
    return [*found, *(FoundRun(output_dir, None, (launch,), records) for launch in alone)], problems


class RunFolders:
    """The runs below some folders."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = list(roots)
        self._output_dirs: list[Path] = []
        self._added: list[Path] = []
        self._walked_at = -_SECONDS_BETWEEN_WALKS

    def runs(self) -> tuple[list[FoundRun], list[str]]:
        """Return all runs, the newest first, and what is wrong with what cannot be read."""
        if time.monotonic() - self._walked_at > _SECONDS_BETWEEN_WALKS:
            self._walk()
        found: list[FoundRun] = []
        problems = [f"'{root}' is not there" for root in self.roots if not root.is_dir()]
        for output_dir in self._output_dirs:
            runs, wrong = runs_in(output_dir)
            found += runs
            problems += wrong
        return sorted(found, key=lambda run: run.name, reverse=True), problems

    def run(self, wanted: str) -> FoundRun | None:
        """Return the run that has, or had, an id."""
        run = self._known(wanted)
        if run is None:
            self._walk()
            run = self._known(wanted)
        return run

    def add(self, output_dir: Path) -> None:
        """Look into this folder too from now on."""
        self._added.append(output_dir)
        self._output_dirs = _once([*self._output_dirs, output_dir])

    def _walk(self) -> None:
        found = [folder for root in self.roots for folder in _output_folders(root, _MOST_LEVELS)]
        self._output_dirs = _once([*found, *self._added])
        self._walked_at = time.monotonic()

    def _known(self, wanted: str) -> FoundRun | None:
        for output_dir in self._output_dirs:
            for run in reversed(runs_in(output_dir)[0]):
                if wanted in run.ids:
                    return run
        return None


def _once(folders: Sequence[Path]) -> list[Path]:
    """Return folders in order, each in the first of its spellings."""
    return sorted({folder.resolve(): folder for folder in reversed(folders)}.values())


def _output_folders(folder: Path, levels: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # somebody else's, or gone
        return
    if RECORD_FOLDER in names and _holds_records(folder / RECORD_FOLDER):
        yield folder
    for name in names if levels else ():
        if not name.startswith("."):
            yield from _output_folders(folder / name, levels - 1)


def _holds_records(folder: Path) -> bool:
    try:
        return any(path.suffix == ".json" or path.name == LAUNCH_FOLDER for path in folder.iterdir())
    except OSError:  # somebody else's, or gone
        return False


def run_id(output_dir: Path, name: str) -> str:
    """Return the id of a run, by the name of its record or of its launch."""
    return digest([f"{output_dir.resolve()}\0{name}".encode(errors="surrogatepass")], 8).hex()
