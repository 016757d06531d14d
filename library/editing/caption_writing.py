"""Changes of captions made on the disk: written down first, each only where its caption is still what it was."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from library.config.errors import UserError
from library.editing.caption_places import Place, locked, read_place, write_entries, write_file
from library.editing.undo_journal import Change, Step, UndoJournal

log = logging.getLogger(__name__)

_NUM_WRITERS = 8  # flushing waits for the disk, which takes several orders at once


@dataclass
class Outcome:
    """What became of changes: written, left alone because the caption is another one by now, or refused by the disk."""

    what: str = ""
    written: list[Change] = field(default_factory=list)
    conflicts: list[Place] = field(default_factory=list)
    failed: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        """Take the results of other changes in."""
        self.written += other.written
        self.conflicts += other.conflicts
        self.failed += other.failed


Progress = Callable[[int], None]


def write_step(
    journal: UndoJournal,
    what: str,
    changes: Sequence[Change],
    group: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write captions as one step that `undo` takes back; captions that are not as `before` says stay as they are.

    The journal is on the disk before the first caption changes. Raise `UserError` if it cannot be written.
    """
    possible = [change for change in changes if _is_as_expected(change)]
    expected = {id(change) for change in possible}
    outcome = Outcome(what, conflicts=[change.place for change in changes if id(change) not in expected])
    if possible:
        journal.record(what, possible, group)
        outcome.add(_written(possible, progress))
    return outcome


def undo(journal: UndoJournal, progress: Progress | None = None) -> Outcome | None:
    """Take the last step back, or the last steps of one group; return None if there is none.

    What was changed since by somebody else stays. Raise `UserError` if the journal cannot be read or written.
    """
    return _played(journal, journal.to_undo(), progress, undone=True)


def redo(journal: UndoJournal, progress: Progress | None = None) -> Outcome | None:
    """Do again what was undone last; return None if there is nothing. Raise as `undo`."""
    return _played(journal, journal.to_redo(), progress, undone=False)


def _played(journal: UndoJournal, steps: Sequence[Step], progress: Progress | None, *, undone: bool) -> Outcome | None:
    if not steps:
        return None
    outcome = Outcome(steps[0].what)
    for step in steps:
        changes = journal.changes_of(step)
        result = _written([change.reversed() for change in changes] if undone else changes, progress)
        outcome.add(result)
        if result.failed:  # the step stays, so that it can be tried again
            break
        journal.mark(step, undone=undone)
    return outcome


def _is_as_expected(change: Change) -> bool:
    try:
        return read_place(change.place) == change.before
    except UserError:  # what cannot be read is not what it was
        return False


def _written(changes: Sequence[Change], progress: Progress | None = None) -> Outcome:
    in_files = [change for change in changes if change.place.key is None]
    in_metadata: dict[Path, list[Change]] = defaultdict(list)
    for change in changes:
        if change.place.key is not None:
            in_metadata[change.place.path].append(change)
    outcome = Outcome()
    for path, own in in_metadata.items():
        outcome.add(_written_entries(path, own))
    if len(in_files) == 1:
        outcome.add(_written_file(in_files[0]))
        return outcome
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        for done, result in enumerate(pool.map(_written_file, in_files), start=1):
            outcome.add(result)
            if progress is not None:
                progress(done)
    return outcome


def _written_file(change: Change) -> Outcome:
    place = change.place
    try:
        with locked(place.path):
            now = read_place(place)
            if now == change.after:  # done before a crash
                return Outcome(written=[change])
            if now != change.before:
                return Outcome(conflicts=[place])
            write_file(place.path, change.after)
            return Outcome(written=[change])
    except UserError as error:
        return Outcome(failed=[(place, str(error))])


def _written_entries(path: Path, changes: Sequence[Change]) -> Outcome:
    try:
        with locked(path):
            conflicts = write_entries(path, {each.place: (each.before, each.after) for each in changes})
    except UserError as error:
        return Outcome(failed=[(each.place, str(error)) for each in changes])
    return Outcome(written=[each for each in changes if each.place not in conflicts], conflicts=conflicts)
