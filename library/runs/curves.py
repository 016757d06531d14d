"""The curves of a run, read from TensorBoard's event files without torch, and read on while the run writes them."""

import threading
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.runs.event_scan import Points, scan

_READ_AT_ONCE = 64 << 20  # bytes


class Curve(NamedTuple):
    """A curve: its `steps` (int64, rising) and `values` (float64), one for each point."""

    steps: np.ndarray
    values: np.ndarray


class CurveFiles:
    """The curves of a log folder, by name, as far as they have been read.

    A later start of the run hides what was logged from its first step on, and of two points at a step the later one
    counts. A file that is damaged, or cut off as a killed run leaves it, is read as far as it goes. Threads may share
    one.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._places: dict[Path, int] = {}
        self._parts: dict[str, list[Points]] = {}
        self._lock = threading.Lock()
        self.damaged: set[Path] = set()
        """Files of which a part cannot be read."""
        self.revision = 0
        """Counts what was read."""

    def refresh(self) -> None:
        """Read what is new. Raise `OSError` where a file cannot be read."""
        with self._lock:
            files = sorted(self._folder.rglob("*tfevents*"))
            sizes = {path: path.stat().st_size for path in files}
            if any(sizes.get(path, 0) < place for path, place in self._places.items()):  # replaced, or removed
                self._places, self._parts, self.damaged = {}, {}, set()
            for path in files:
                if path not in self.damaged and sizes[path] > self._places.get(path, 0):
                    self._read(path)

    def unread(self) -> dict[Path, int]:
        """Return the bytes at the ends of files that are no whole records."""
        with self._lock:
            behind = {path: path.stat().st_size - place for path, place in self._places.items() if path.exists()}
        return {path: count for path, count in behind.items() if count > 0}

    def names(self) -> list[str]:
        """Return the names of the curves, in the order in which they began."""
        with self._lock:
            return [name for name, parts in self._parts.items() if any(len(part.steps) for part in parts)]

    def curve(self, name: str) -> Curve:
        """Return a curve. Raise `KeyError` if there is none."""
        points = self.points(name)
        return Curve(points.steps, points.values)

    def points(self, name: str) -> Points:
        """Return a curve with the time of each point. Raise `KeyError` if there is none."""
        with self._lock:
            points = _in_order(_joined(self._parts[name]))
            self._parts[name] = [points]
        return points

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._places.get(path, 0))
            wanted = _READ_AT_ONCE
            while data := file.read(wanted):
                found = scan(data)
                for stretch in found.stretches:
                    if stretch.start is not None:
                        self._forget_from(stretch.start)
                    for name, points in stretch.points.items():
                        self._parts.setdefault(name, []).append(points)
                self._places[path] = self._places.get(path, 0) + found.num_bytes
                self.revision += 1
                if found.is_damaged:
                    self.damaged.add(path)
                if found.is_damaged or (len(data) < wanted and found.num_bytes == 0):
                    return
                wanted = _READ_AT_ONCE if found.num_bytes else 2 * wanted  # for one very long record
                file.seek(self._places[path])

    def _forget_from(self, step: int) -> None:
        for name, parts in self._parts.items():
            points = _joined(parts)
            is_kept = points.steps < step
            self._parts[name] = [Points(*(each[is_kept] for each in points))]


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves of a log folder by name, as `CurveFiles` reads them."""
    files = CurveFiles(folder)
    files.refresh()
    return {name: files.curve(name) for name in files.names()}


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
    is_kept = np.zeros(len(curve.steps), bool)
    is_kept[extremes] = is_kept[0] = is_kept[whole:] = True
    return Curve(curve.steps[is_kept], curve.values[is_kept])


def within(curve: Curve, first: int | None, last: int | None) -> Curve:
    """Return the points from step `first` to step `last`, and one more on each side; None is without an end."""
    low = 0 if first is None else max(0, int(np.searchsorted(curve.steps, first)) - 1)
    high = len(curve.steps) if last is None else int(np.searchsorted(curve.steps, last, "right")) + 1
    return Curve(curve.steps[low:high], curve.values[low:high])


def _joined(parts: Collection[Points]) -> Points:
    if len(parts) == 1:
        return next(iter(parts))
    return Points(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _in_order(points: Points) -> Points:
    """Return the points by step; of several at a step the one that was written last."""
    if (np.diff(points.steps) > 0).all():
        return points
    order = points.steps.argsort(kind="stable")
    steps = points.steps[order]
    is_last = np.append(steps[1:] != steps[:-1], True)
    return Points(*(each[order][is_last] for each in points))
