"""TensorBoard's event files: their records, and what a resumed run must not show twice."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<Q4x")  # the length of a record and the checksum of that
_FOOTER_BYTES = 4


def names_at(folder: Path, step: int) -> frozenset[str]:
    """Return the names of all that TensorBoard shows of `step`, from the event files in `folder`.

    A later start of the run hides what was logged from its first step on, as TensorBoard does.
    """
    from tensorboard.compat.proto.event_pb2 import SessionLog

    names: set[str] = set()
    for path in sorted(folder.glob("*tfevents*")):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START and event.step <= step:
                names.clear()
            elif event.step == step:
                names |= {value.tag for value in event.summary.value}
    return frozenset(names)


def events_of(path: Path) -> Iterator[Any]:
    """Yield the events of a file, as far as it can be read: a record that is damaged or cut off ends it."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    for record in _records(path):
        try:
            yield Event.FromString(record)
        except DecodeError:
            return


def _records(path: Path) -> Iterator[bytes]:
    """Yield the whole records of an event file; a killed run may have written half of the last one."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            (num_bytes,) = _HEADER.unpack(header)
            record = file.read(num_bytes)
            if len(record) < num_bytes or len(file.read(_FOOTER_BYTES)) < _FOOTER_BYTES:
                return
            yield record
