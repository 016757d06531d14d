"""What a run leaves about itself: one small JSON file in its output folder, written when it begins and when it ends."""

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from library.config.atomic_files import write_text
from library.config.config_file import toml_value
from library.config.errors import UserError
from library.config.file_names import TIME_FORMAT, writable_text
from library.config.options import options_of
from library.training.progress import Progress

if TYPE_CHECKING:
    from library.captions.draws import Encoder

log = logging.getLogger(__name__)

RECORD_FOLDER = "run"
"""The folder of the records, in the output folder."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
RUNS, VANISHED, ELSEWHERE = "runs", "vanished", "on another machine"

_FORMAT = 1
_CLOCKS_DIFFER = 2.0  # seconds by which two readings of the moment a process was created may differ


@dataclass(frozen=True)
class Start:
    """A start of a run at optimizer step `step`: when (ISO 8601), and in which process of which machine.

    `created` is when the process was created, in seconds since 1970: its number may be another's later.
    """

    time: str
    step: int
    host: str
    pid: int
    created: float

    @classmethod
    def now(cls, step: int) -> Self:
        """Return a start of this process."""
        process = psutil.Process()
        return cls(_now(), step, platform.node(), process.pid, process.create_time())

    @property
    def is_running(self) -> bool:
        """Whether the process still exists, as far as this machine can know."""
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """Return the process; None if it has ended, or is on another machine."""
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.created) < _CLOCKS_DIFFER
            if self.host == platform.node() and is_same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def is_of_process(self, other: "Start") -> bool:
        """Return whether both starts are by one process."""
        is_same_number = (self.host, self.pid) == (other.host, other.pid)
        return is_same_number and abs(self.created - other.created) < _CLOCKS_DIFFER


@dataclass(frozen=True)
class End:
    """How a start ended, when, and after which step; `message` is the last line of an error."""

    time: str
    step: int
    outcome: str
    message: str = ""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    `options` are those that differ from their defaults, by name and without secrets, as a TOML file has them. `set`
    counts what is trained on, `captions` says where each encoder's come from. `log_folder` holds TensorBoard's files.
    """

    started: str
    output_name: str | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    set: Mapping[str, int] = field(default_factory=dict)
    captions: Mapping["Encoder", str] = field(default_factory=dict)
    log_folder: str | None = None
    starts: Sequence[Start] = ()
    end: End | None = None

    @property
    def name(self) -> str:
        """The time of the run's start, as in the names of its samples, and its output name."""
        name = "" if self.output_name is None else f"_{self.output_name}"
        return f"{datetime.fromisoformat(self.started):{TIME_FORMAT}}{name}"

    @property
    def state(self) -> str:
        """How the run stands: how it ended, or whether its process still exists."""
        if self.end is not None:
            return self.end.outcome
        if self.starts and self.starts[-1].host != platform.node():
            return ELSEWHERE
        return RUNS if self.starts and self.starts[-1].is_running else VANISHED

    def as_text(self) -> str:
        """Return the text of the file."""
        return writable_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def of_text(cls, text: str) -> Self:
        """Return the record. Raise `ValueError` for a text that is none."""
        content = json.loads(text)
        try:
            if content.pop("format") != _FORMAT:
                raise ValueError("it is of another version of this program")
            starts = tuple(Start(**each) for each in content.pop("starts"))
            end = content.pop("end")
            record = cls(**content, starts=starts, end=None if end is None else End(**end))
            datetime.fromisoformat(record.started)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is no record of a run ({error})") from error
        return record


class RecordFile:
    """Keeps the record of a run on disk; `is_writer` is True in the main process alone.

    A record that cannot be written does not end the run. One that exists is of the run that is resumed.
    """

    def __init__(self, output_dir: Path, record: RunRecord, progress: Progress, *, is_writer: bool):
        self._path = output_dir / RECORD_FOLDER / f"{record.name}.json"
        self._record = record
        self._progress = progress
        self._is_writer = is_writer

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Record a start; an error that leaves the block is recorded as the end of the run."""
        if self._is_writer:
            self._record = replace(self._record, starts=(*self._earlier_starts(), Start.now(self._progress.step)))
            self._write()
        try:
            yield
        except SystemExit:
            self.end(STOPPED, "It was ended at once, without a save.")
            raise
        except BaseException as error:
            self.end(FAILED, (str(error) or type(error).__name__).splitlines()[0])
            raise

    def end(self, outcome: str, message: str = "") -> None:
        """Record the end, after the last optimizer step."""
        self._record = replace(self._record, end=End(_now(), self._progress.step, outcome, message))
        if self._is_writer:
            self._write()

    def _earlier_starts(self) -> Sequence[Start]:
        try:
            return RunRecord.of_text(self._path.read_text(encoding="utf-8")).starts
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            log.warning("'%s' is replaced: %s", self._path, error)
            return ()

    def _write(self) -> None:
        try:
            write_text(self._path, self._record.as_text())
        except UserError as error:
            log.warning("'%s' cannot be written (%s); training continues", self._path, error)


def find_records(output_dir: Path) -> list[RunRecord]:
    """Return the records in an output folder, oldest first; those that cannot be read are named and left out."""
    records, problems = read_records(output_dir)
    for problem in problems:
        log.warning("%s; it is left out", problem)
    return records


def read_records(output_dir: Path) -> tuple[list[RunRecord], list[str]]:
    """Return the records in an output folder, oldest first, and what is wrong with those that cannot be read."""
    records, problems = [], []
    for path in sorted((output_dir / RECORD_FOLDER).glob("*.json")):
        try:
            records.append(RunRecord.of_text(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            problems.append(f"'{path}' cannot be read ({error})")
    return sorted(records, key=lambda record: record.started), problems


def changed_values(groups: Any) -> dict[str, Any]:
    """Return the options of a run that differ from their defaults, by name, as TOML has them; secrets are left out."""
    return {
        each.name: toml_value(getattr(group, each.name))
        for group in vars(groups).values()
        for each in options_of(type(group))
        if not each.is_secret and getattr(group, each.name) != each.default
    }


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
