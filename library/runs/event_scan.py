"""The scalars in the bytes of TensorBoard's event files: most records are read by their places, a million at a time."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<Q")
_BEFORE, _AROUND = 12, 16  # bytes of length and checksum before a record, and with those behind it
_LONGEST_WITH_SCALARS = 4096
"""Longer records hold images and texts."""
_LONGEST_BY_PLACE = 127  # so that every length within the record is one byte
_LONGEST_PERIOD, _RECORDS_AT_ONCE = 64, 1 << 16
_STEP_AT = 10
_MOST_STEP_BYTES = 5
_WALL_TIME, _STEP, _SUMMARY, _INSIDE, _SIMPLE_VALUE = 0x09, 0x10, 0x2A, 0x0A, 0x15
"""The bytes before fields of an event, and of a value in it."""

Bytes = npt.NDArray[np.uint8]


class Points(NamedTuple):
    """Points of a curve in the order in which they were written; `times` are seconds since 1970."""

    steps: np.ndarray
    values: np.ndarray
    times: np.ndarray


class Stretch(NamedTuple):
    """Points by name that were written after a start of the run at `start`; None for those before any start."""

    start: int | None
    points: dict[str, Points]


class Scan(NamedTuple):
    """What `scan` found: stretches in order, the bytes that were read, and whether the rest is damaged."""

    stretches: list[Stretch]
    num_bytes: int
    is_damaged: bool


def scan(data: bytes) -> Scan:
    """Return the scalars of an event file, or of a part of one that begins with a record; as far as it can be read.

    A record that is cut off is left for the next time, and one that is no event ends the reading.
    """
    edges = _places(data)
    places, lengths = edges[:-1], np.diff(edges) - _AROUND
    content = np.frombuffer(data, np.uint8)
    is_event = (lengths > _STEP_AT) & (content[np.minimum(places + _BEFORE, len(content) - 1)] == _WALL_TIME)
    is_sound = is_event | (lengths == 0)
    num_sound = len(places) if is_sound.all() else int(is_sound.argmin())
    by_place, rest = _by_place(content, places[:num_sound] + _BEFORE, lengths[:num_sound])
    starts, by_name, num_read = _decoded(data, edges, rest, num_sound)
    for name, rows, points in by_place:
        by_name.setdefault(name, []).append((rows, points))
    stretches = _in_stretches(starts, by_name, num_read)
    return Scan(stretches, int(edges[num_read]), is_damaged=num_read < len(places))


def _places(data: bytes) -> np.ndarray:
    """Return where each whole record begins, and where the last one ends.

    Steps log the same curves, so that lengths repeat: what repeats is taken many records at a time.
    """
    content, end = np.frombuffer(data, np.uint8), len(data)
    parts, place, unpack = [np.zeros(1, np.int64)], 0, _LENGTH.unpack_from
    while True:
        places: list[int] = []
        while place + _BEFORE <= end and len(places) < 2 * _LONGEST_PERIOD:
            place += unpack(data, place)[0] + _AROUND
            if place > end:
                break
            places.append(place)
        parts.append(np.array(places, np.int64))
        if len(places) < 2 * _LONGEST_PERIOD:
            return np.concatenate(parts)
        parts.append(_repeated(content, parts[-1]))
        place = int(parts[-1][-1]) if len(parts[-1]) else place


def _repeated(content: Bytes, places: np.ndarray) -> np.ndarray:
    """Return the places of the records that repeat the lengths of those at the end of `places`."""
    lengths = np.diff(places)
    periods = (
        period for period in range(1, _LONGEST_PERIOD) if (lengths[-period:] == lengths[-2 * period :][:period]).all()
    )
    period = next(periods, None)
    if period is None:
        return places[:0]
    ends = np.cumsum(lengths[-period:])
    starts = ends - lengths[-period:]
    num_blocks = min((len(content) - int(places[-1])) // int(ends[-1]), _RECORDS_AT_ONCE // period)
    blocks = places[-1] + np.arange(num_blocks)[:, None] * ends[-1]
    said = content[(blocks + starts)[:, :, None] + np.arange(_LENGTH.size)].view("<i8")[:, :, 0]
    is_right = (said + _AROUND == lengths[-period:]).all(1)
    num_right = num_blocks if is_right.all() else int(is_right.argmin())
    return (blocks[:num_right] + ends).ravel()


Found = tuple[np.ndarray, Points]
"""Numbers of records, and the points in them."""


def _by_place(content: Bytes, places: np.ndarray, lengths: np.ndarray) -> tuple[list[tuple[str, *Found]], np.ndarray]:
    """Return the scalars that have the usual layout, and the numbers of the records that have not."""
    found: list[tuple[str, *Found]] = []
    is_found = np.zeros(len(places), bool)
    usual = lengths[(lengths > _STEP_AT) & (lengths <= _LONGEST_BY_PLACE)]
    for length in np.flatnonzero(np.bincount(usual, minlength=1)):
        rows = np.flatnonzero(lengths == length)
        records = np.lib.stride_tricks.sliding_window_view(content, int(length))[places[rows]]
        is_open = records[:, 9] == _STEP
        for num_step_bytes in range(1, _MOST_STEP_BYTES + 1):
            if _STEP_AT + num_step_bytes >= length:
                break
            is_last = records[:, _STEP_AT + num_step_bytes - 1] < 128
            chosen = np.flatnonzero(is_open & is_last)
            is_open &= ~is_last
            for name, own, points in _of_layout(records[chosen], num_step_bytes):
                found.append((name, rows[chosen[own]], points))
                is_found[rows[chosen[own]]] = True
    return found, np.flatnonzero(~is_found & (lengths <= _LONGEST_WITH_SCALARS) & (lengths > 0))


def _of_layout(records: Bytes, num_step_bytes: int) -> Iterator[tuple[str, *Found]]:
    """Yield name, rows and points of records (n, bytes) that are a time, a step, and one value with its name."""
    behind = records[:, _STEP_AT + num_step_bytes :]
    length = behind.shape[1]
    if length < 12 or not len(records):
        return
    expected = {0: _SUMMARY, 1: length - 2, 2: _INSIDE, 3: length - 4, 4: _INSIDE, 5: length - 11, -5: _SIMPLE_VALUE}
    is_usual = np.ones(len(records), bool)
    for place, byte in expected.items():
        is_usual &= behind[:, place] == byte
    rows = np.flatnonzero(is_usual)
    while len(rows):
        name = behind[rows[0], 6:-5]
        is_own = (behind[rows, 6:-5] == name).all(1)
        own = rows[is_own]
        steps = np.zeros(len(own), np.int64)
        for place in range(num_step_bytes):
            steps |= (records[own, _STEP_AT + place].astype(np.int64) & 127) << (7 * place)
        values = np.ascontiguousarray(behind[own, -4:]).view("<f4")[:, 0].astype(np.float64)
        times = np.ascontiguousarray(records[own, 1:9]).view("<f8")[:, 0]
        yield name.tobytes().decode("utf-8", "replace"), own, Points(steps, values, times)
        rows = rows[~is_own]


def _decoded(
    data: bytes, places: np.ndarray, rest: np.ndarray, num_sound: int
) -> tuple[list[tuple[int, int]], dict[str, list[Found]], int]:
    """Read records one by one: return the starts of the run (record, step), points, and how many records are sound."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    starts: list[tuple[int, int]] = []
    found: dict[str, list[Found]] = {}
    for row in map(int, rest):
        try:
            event = Event.FromString(data[places[row] + _BEFORE : places[row + 1] - _AROUND + _BEFORE])
        except DecodeError:
            return starts, found, row
        if event.session_log.status == SessionLog.START:
            starts.append((row, event.step))
        for value in event.summary.value:
            if value.HasField("simple_value"):
                point = Points(
                    np.array([event.step], np.int64), np.array([value.simple_value]), np.array([event.wall_time])
                )
                found.setdefault(value.tag, []).append((np.array([row]), point))
    return starts, found, num_sound


def _in_stretches(starts: list[tuple[int, int]], by_name: dict[str, list[Found]], num_read: int) -> list[Stretch]:
    stretches = [Stretch(None, {}), *(Stretch(step, {}) for _, step in starts)]
    edges = np.array([0, *(row for row, _ in starts), num_read])
    for name, parts in by_name.items():
        rows = np.concatenate([rows for rows, _ in parts])
        order = rows.argsort(kind="stable")
        points = Points(*(np.concatenate(each)[order] for each in zip(*(points for _, points in parts), strict=True)))
        cuts = np.searchsorted(rows[order], edges)
        for stretch, first, last in zip(stretches, cuts[:-1], cuts[1:], strict=True):
            if last > first:
                stretch.points[name] = Points(*(each[first:last] for each in points))
    return stretches
