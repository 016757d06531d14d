"""What captions were before they changed: a journal on the disk, written before each change, that undoes them."""

import base64
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from library.config.atomic_files import CannotWrite, replacing
from library.config.digests import digest
from library.config.errors import UserError
from library.editing.caption_places import Place, locked

log = logging.getLogger(__name__)

_LARGEST_JOURNAL = 256 << 20
_KEPT_OF_IT = 128 << 20
_STEP, _UNDONE, _REDONE = "step", "undone", "redone"


class Change(NamedTuple):
    """One caption from `before` to `after`; None where there is no file."""

    place: Place
    before: bytes | None
    after: bytes | None

    def reversed(self) -> "Change":
        """Return the way back."""
        return Change(self.place, self.after, self.before)


@dataclass
class Step:
    """Changes that belong together, as the journal knows them; steps in a row with one `group` are undone together."""

    number: int
    what: str
    time: str
    num_changes: int
    group: str | None
    is_undone: bool = False
    _line: tuple[int, int] = field(default=(0, 0), repr=False)  # offset and length in the file


class UndoJournal:
    """Steps in a file of JSON lines, each flushed to the disk before the changes that it describes are made.

    Processes may share a journal. A line that a crash or a full disk left incomplete is removed by the next one.
    """

    def __init__(self, path: Path):
        self.path = path
        self._steps: list[Step] = []
        self._num_read = 0
        self._shorten()

    def steps(self) -> list[Step]:
        """Return all steps, oldest first. Raise `UserError` if the journal cannot be read."""
        with locked(self.path):
            self._read_on()
            return list(self._steps)

    def record(self, what: str, changes: Sequence[Change], group: str | None = None) -> int:
        """Write down a step that is about to be done; return its number. What was undone before it is forgotten.

        Raise `UserError` if the disk refuses: then nothing may be changed.
        """
        with locked(self.path):
            self._read_on()
            number = self._steps[-1].number + 1 if self._steps else 1
            record = {
                _STEP: number,
                "what": what,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "group": group,
                "num": len(changes),
                "changes": [_packed(change) for change in changes],
            }
            self._append(record)
            return number

    def changes_of(self, step: Step) -> list[Change]:
        """Return what a step changes. Raise `UserError` if the journal cannot be read."""
        offset, length = step._line
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return [_unpacked(packed) for packed in json.loads(file.read(length))["changes"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"the journal '{self.path}' cannot be read: {error}.", "It was changed or moved."
            ) from error

    def mark(self, step: Step, *, undone: bool) -> None:
        """Write down that a step was undone, or done again. Raise `UserError` if the disk refuses."""
        with locked(self.path):
            self._read_on()
            self._append({_UNDONE if undone else _REDONE: step.number})

    def to_undo(self) -> list[Step]:
        """Return the last group of steps that can be undone, latest first; none if there is none."""
        return self._last_group([step for step in self.steps() if not step.is_undone])

    def to_redo(self) -> list[Step]:
        """Return the group of steps that was undone last, in the order in which to do it again."""
        undone: list[Step] = []
        for step in reversed(self.steps()):
            if not step.is_undone:
                break
            undone.append(step)
        return self._last_group(undone)

    def _last_group(self, steps: Sequence[Step]) -> list[Step]:
        found: list[Step] = []
        for step in reversed(steps):
            if found and (step.group is None or step.group != found[0].group):
                break
            found.append(step)
        return found

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode()
        line = line[:-1] + f',"check":"{_check(line)}"}}\n'.encode()
        try:
            with self._opened() as file:
                file.truncate(self._num_read)  # of a line that was never finished
                file.seek(self._num_read)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._num_read)
                    raise
        except OSError as error:
            raise CannotWrite(
                f"the undo journal '{self.path}' cannot be written: {error.strerror or error}. Nothing was changed.",
                "Free some space on its disk.",
                is_temporary=True,
            ) from error
        self._read_on()

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            yield file

    def _read_on(self) -> None:
        """Take in the lines that were added since the last time, by whichever process."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._num_read:  # shortened, or replaced
                    self._steps, self._num_read = [], 0
                file.seek(self._num_read)
                for line in file:
                    record = _checked(line)
                    if record is None:
                        break
                    self._take(record, (self._num_read, len(line)))
                    self._num_read += len(line)
        except FileNotFoundError:
            self._steps, self._num_read = [], 0
        except OSError as error:
            raise UserError(f"cannot read '{self.path}': {error.strerror or error}.", "Check the file.") from error

    def _take(self, record: dict[str, Any], line: tuple[int, int]) -> None:
        if _STEP in record:
            self._steps = [step for step in self._steps if not step.is_undone]
            self._steps.append(
                Step(record[_STEP], record["what"], record["time"], record["num"], record["group"], _line=line)
            )
            return
        number, is_undone = record.get(_UNDONE, record.get(_REDONE)), _UNDONE in record
        for step in self._steps:
            if step.number == number:
                step.is_undone = is_undone

    def _shorten(self) -> None:
        """Forget the oldest steps of a journal that has become very large, and those that are undone."""
        if not self.path.is_file() or self.path.stat().st_size <= _LARGEST_JOURNAL:
            return
        with locked(self.path):
            self._read_on()
            steps, num_bytes = [], 0
            for step in reversed([step for step in self._steps if not step.is_undone]):
                num_bytes += step._line[1]
                if num_bytes > _KEPT_OF_IT:
                    break
                steps.append(step)
            with replacing(self.path) as shorter, self.path.open("rb") as file:
                for step in reversed(steps):
                    file.seek(step._line[0])
                    shorter.write(file.read(step._line[1]))
            log.info("the undo journal '%s' was shortened to the last %d steps", self.path, len(steps))
            self._steps, self._num_read = [], 0


def _packed(change: Change) -> list[str | None]:
    place = change.place
    contents = (change.before, change.after)
    return [str(place.path), place.key, place.name, *(None if each is None else _as_text(each) for each in contents)]


def _unpacked(packed: Sequence[str | None]) -> Change:
    path, key, name, *contents = packed
    before, after = (None if each is None else _as_bytes(each) for each in contents)
    return Change(Place(Path(str(path)), key, name), before, after)


def _as_text(content: bytes) -> str:
    """Return bytes as text that JSON holds: "=" and the text, or "~" and base64 of what is not UTF-8."""
    try:
        return f"={content.decode('utf-8')}"
    except UnicodeDecodeError:
        return f"~{base64.b64encode(content).decode()}"


def _as_bytes(text: str) -> bytes:
    return text[1:].encode("utf-8") if text.startswith("=") else base64.b64decode(text[1:])


def _check(line: bytes) -> str:
    return digest([line], 8).hex()


def _checked(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None if it is not whole."""
    body, mark, check = line.rpartition(b',"check":"')
    if not mark or check.rstrip(b'"}\n').decode(errors="replace") != _check(body + b"}") or not line.endswith(b"\n"):
        return None
    record = json.loads(line)
    return record if isinstance(record, dict) else None
