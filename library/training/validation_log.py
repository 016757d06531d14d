"""The figures of each validation: curves in the trackers, and a line of JSON with all of them beside the logs."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.config.atomic_files import CannotWrite, write_text
from library.training.ablation import Estimate, Losses

log = logging.getLogger(__name__)

FILE_NAME = "validation.jsonl"
_CURVES_OF_WORTH = ("l", "g", "interaction")
_ERROR = "standard_error"


class ValidationLog:
    """Logs the figures of validations; `folder` (None: none) is the log folder of the run.

    The file keeps what a resumed run has measured up to `step`, and loses what was measured after that.
    """

    def __init__(
        self,
        log_values: Callable[[int, Mapping[str, float]], None],
        folder: Path | None,
        step: int,
        *,
        is_writer: bool,
    ):
        self._log_values = log_values
        self._file = folder / FILE_NAME if folder is not None and is_writer else None
        self._lines = [line for line in _read(self._file) if line["step"] <= step]

    def add(self, step: int, suffix: str, losses: Losses) -> None:
        """Log the figures of a step; the names of the curves of a set of weights have its `suffix`."""
        curves = {f"validation{suffix}/{condition}": losses.mean(condition) for condition in losses.of}
        worth = losses.worth()
        for name, estimate in worth.items():
            if name.partition("/")[0] in _CURVES_OF_WORTH:
                curves[f"worth{suffix}/{name}"] = estimate.mean
                curves[f"worth{suffix}/{name}/{_ERROR}"] = estimate.error
        self._log_values(step, {name: value for name, value in curves.items() if not math.isnan(value)})
        if self._file is not None:
            self._write(self._file, step, f"validation{suffix}", losses, worth)

    def _write(self, file: Path, step: int, name: str, losses: Losses, worth: Mapping[str, Estimate]) -> None:
        means = {condition: _number(losses.mean(condition)) for condition in losses.of}
        differences = {
            each: {"mean": _number(estimate.mean), _ERROR: _number(estimate.error)} for each, estimate in worth.items()
        }
        line = {"step": step, "name": name, "timesteps": losses.timesteps, "losses": means, "worth": differences}
        self._lines = [each for each in self._lines if (each["step"], each["name"]) != (step, name)] + [line]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(f"{json.dumps(each)}\n" for each in self._lines))
        except (CannotWrite, OSError) as error:
            log.warning("'%s' cannot be written (%s); training continues", file, error)


def read_validations(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of each validation in a log folder: its step, name, timesteps, losses and worth."""
    return _read(folder / FILE_NAME)


def _read(file: Path | None) -> list[dict[str, Any]]:
    """Return the lines of the file; those that are no figures, of a disk that was full, are left out."""
    if file is None or not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and "name" in line:
            lines.append(line)
    return lines


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
