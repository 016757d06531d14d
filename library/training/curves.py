"""The curves of a run, read from TensorBoard's event files without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.training.event_files import events_of


class Curve(NamedTuple):
    """A curve: its `steps` (int64, rising) and `values` (float64), one for each point."""

    steps: np.ndarray
    values: np.ndarray


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves of a log folder by name.

    A later start of the run hides what was logged from its first step on, and of two points at a step the later one
    counts. A file that is damaged, or cut off as a killed run leaves it, is read as far as it goes.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog

    points: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("*tfevents*")):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START:
                for curve in points.values():
                    _forget_from(curve, event.step)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: _curve(of_step) for name, of_step in points.items() if of_step}


def thinned(curve: Curve, num_points: int) -> Curve:
    """Return at most about `num_points` of the points: of each stretch of the curve its lowest and its highest."""
    num_stretches = max(1, num_points // 2)
    length = len(curve.steps) // num_stretches
    if length <= 2:
        return curve
    whole = length * num_stretches
    stretches = curve.values[:whole].reshape(num_stretches, length)
    starts = np.arange(num_stretches) * length
    extremes = np.concatenate([stretches.argmin(1) + starts, stretches.argmax(1) + starts])
    kept = np.unique(np.concatenate([extremes, [0], np.arange(whole, len(curve.steps))]))
    return Curve(curve.steps[kept], curve.values[kept])


def _forget_from(curve: dict[int, float], step: int) -> None:
    for later in [each for each in curve if each >= step]:
        del curve[later]


def _curve(of_step: Mapping[int, float]) -> Curve:
    steps = np.fromiter(of_step, np.int64, len(of_step))
    order = steps.argsort(kind="stable")
    return Curve(steps[order], np.fromiter(of_step.values(), np.float64, len(of_step))[order])
