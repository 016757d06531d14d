"""A run while it goes on: how far it is, how long it will take, its curves, and what happened at which step."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from library.config.errors import listed
from library.runs.curves import Curve, CurveFiles, thinned, within
from library.runs.files import saved_files, span_of
from library.runs.folders import FoundRun
from library.runs.log import last_bar, read_log_end
from library.training.gradient_spikes import NormMean
from library.training.run_record import RunRecord
from library.training.saves import step_of

LOSS, NORM = "loss/current", "grad_norm"
_POINTS_OF_PACE = 200
_MOST_MARKS = 2000
_LINES_WITH_BAR = 40


@dataclass(frozen=True)
class Pace:
    """Where a run is: the step, the number of steps, and the seconds that are left; None where that is not known."""

    step: int | None
    num_steps: int | None
    seconds_left: float | None


class RunWatch:
    """Reads on what a run writes; `log_folder` is that of its curves, None where there are none."""

    def __init__(self, log_folder: Path | None):
        self.log_folder = log_folder
        self._files = None if log_folder is None else CurveFiles(log_folder)
        self._norms = NormMean()
        self._last_norm: tuple[int, int] = 0, -1  # how many were seen, and the step of the last
        self._spikes: list[int] = []
        self._counting = threading.Lock()

    def refresh(self) -> str | None:
        """Read what is new; return what is wrong with the logs."""
        if self._files is None or self.log_folder is None:
            return None
        if not self.log_folder.is_dir():
            return f"its logs are not there: '{self.log_folder}'"
        try:
            self._files.refresh()
        except OSError as error:
            return f"its logs cannot be read: {error.strerror or error}"
        if self._files.damaged:
            names = [f"'{path.name}'" for path in sorted(self._files.damaged)]
            return f"a log is damaged and was read as far as it goes: {listed(names)}"
        return None

    def names(self) -> list[str]:
        """Return the names of the curves."""
        return [] if self._files is None else self._files.names()

    def curve(self, name: str, first: int | None, last: int | None, num_points: int) -> Curve | None:
        """Return a curve from one step to another, thinned; None if there is none of this name."""
        if self._files is None or name not in self._files.names():
            return None
        return thinned(within(self._files.curve(name), first, last), num_points)

    def pace(self, run: FoundRun) -> Pace:
        """Return where the run is, from its record, its curves and its progress bar."""
        record = run.record
        num_steps = None if record is None else record.set.get("steps")
        if record is not None and record.end is not None:
            return Pace(record.end.step, num_steps, None)
        if LOSS in self.names():
            assert self._files is not None
            steps, _, times = self._files.points(LOSS)
            step = int(steps[-1])
            return Pace(step, num_steps, None if num_steps is None else _seconds_left(steps, times, record, num_steps))
        bar = None if run.log_file is None else _bar_of(run.log_file)
        begun = record.starts[-1].step if record is not None and record.starts else None
        return Pace(begun, num_steps, None) if bar is None else Pace(bar[0], bar[1], None)

    def marks(self, run: FoundRun) -> dict[str, list[int]]:
        """Return the steps of saves, resumed starts, spikes of the gradient, and losses that are not finite."""
        record = run.record
        if record is None:
            return {}
        span = span_of(record, run.records)
        saved = {step for path in saved_files(run.output_dir, record, span) if (step := step_of(path.name)) is not None}
        return {
            "saved": sorted(saved),
            "resumed": [start.step for start in record.starts[1:]],
            "spike": self._spike_steps(),
            "not finite": self._bad_steps()[-_MOST_MARKS:],
        }

    def _spike_steps(self) -> list[int]:
        if self._files is None or NORM not in self._files.names():
            return []
        with self._counting:  # each norm once, whoever asks
            steps, norms = self._files.curve(NORM)
            num_seen, last = self._last_norm
            if num_seen > len(steps) or (num_seen and steps[num_seen - 1] != last):  # the run went back to a state
                self._norms, self._spikes, num_seen = NormMean(), [], 0
            for step, norm in zip(steps[num_seen:].tolist(), norms[num_seen:].tolist(), strict=True):
                if self._norms.times_usual(norm) is not None:
                    self._spikes.append(step)
            self._last_norm = len(steps), int(steps[-1]) if len(steps) else -1
            return self._spikes[-_MOST_MARKS:]

    def _bad_steps(self) -> list[int]:
        if LOSS not in self.names():
            return []
        assert self._files is not None
        steps, losses = self._files.curve(LOSS)
        return list(map(int, steps[~np.isfinite(losses)]))


def as_json(curve: Curve) -> dict[str, Any]:
    """Return a curve as JSON has it: null for what is not finite."""
    values = [value if math.isfinite(value) else None for value in curve.values.tolist()]
    return {"steps": curve.steps.tolist(), "values": values}


def _seconds_left(steps: np.ndarray, times: np.ndarray, record: RunRecord | None, num_steps: int) -> float | None:
    """Return the time that the steps to come take, at the pace of the last ones, with their samples and saves."""
    started = datetime.fromisoformat(record.starts[-1].time).timestamp() if record and record.starts else 0.0
    recent: Sequence[int] = np.flatnonzero(times[-_POINTS_OF_PACE:] >= started).tolist()
    if len(recent) < 2:
        return None
    first = len(times) - len(times[-_POINTS_OF_PACE:]) + recent[0]
    num_done = int(steps[-1] - steps[first])
    return float(times[-1] - times[first]) / num_done * (num_steps - int(steps[-1])) if num_done > 0 else None


def _bar_of(log_file: Path) -> tuple[int, int] | None:
    try:
        return last_bar(read_log_end(log_file, _LINES_WITH_BAR).lines)
    except OSError:  # gone with its folder, which is told elsewhere
        return None
