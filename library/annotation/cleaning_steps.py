"""A cleaning as one step: it is finished after a kill, and undone to the byte.

The journal of `editing/undo_journal` is written before any caption changes. Beside it lies a mark while captions are
being written, which says of which command they are.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from library.config.atomic_files import write_text
from library.config.errors import UserError, listed
from library.data.strict_json import read_utf8
from library.editing.caption_writing import Outcome, redo, undo, write_step
from library.editing.undo_journal import Change, UndoJournal

log = logging.getLogger(__name__)

EXIT_SOME_LEFT = 1


def write_cleaning(path: Path, what: str, changes: Sequence[Change]) -> int:
    """Write the changes of a command, `what`, as one step of the journal `path`; return 1 if some were left.

    Raise `UserError` if the journal cannot be written, or a caption: the next start or `undo_cleaning` takes it up.
    """
    mark = _mark(path)
    write_text(mark, f"{what}\n")
    with _progress("writing", len(changes)) as bar:
        outcome = write_step(UndoJournal(path), what, changes, progress=lambda done: bar.update(done - bar.n))
    return _ended(outcome, mark)


def finish_cleaning(path: Path, what: str) -> int | None:
    """Finish a step that was killed while it was written; return a status if it was of the same command, else None."""
    mark = _mark(path)
    if not mark.is_file():
        return None
    killed = read_utf8(mark).strip()
    journal = UndoJournal(path)
    steps = journal.to_undo()
    if not steps or steps[0].what != killed:  # killed before the journal knew of it: nothing was changed
        mark.unlink()
        return None
    log.warning("a cleaning of %d captions was interrupted; it is finished now", steps[0].num_changes)
    _require_whole(undo(journal))
    status = _ended(redo(journal) or Outcome(), mark)
    if killed != what:
        return None
    log.info("it was this command: run it once more to clean the captions a second time")
    return status


def undo_cleaning(path: Path) -> int:
    """Undo the last step of a journal that is not undone; return 1 if some captions were left."""
    journal = UndoJournal(path)
    steps = journal.to_undo()
    if not steps:
        log.info("there is nothing to undo in '%s'", path)
        return 0
    with _progress("restoring", steps[0].num_changes) as bar:
        outcome = undo(journal, progress=lambda done: bar.update(done - bar.n)) or Outcome()
    status = _ended(outcome, _mark(path))
    log.info("restored %d captions; %d earlier steps can be undone", len(outcome.written), _num_to_undo(journal))
    return status


def _num_to_undo(journal: UndoJournal) -> int:
    return sum(not step.is_undone for step in journal.steps())


def _ended(outcome: Outcome, mark: Path) -> int:
    _require_whole(outcome)
    mark.unlink(missing_ok=True)
    if outcome.conflicts:
        names = listed([f"'{place}'" for place in outcome.conflicts])
        log.warning("%d captions were changed by somebody else and stay as they are: %s", len(outcome.conflicts), names)
    return EXIT_SOME_LEFT if outcome.conflicts else 0


def _require_whole(outcome: Outcome | None) -> None:
    """Raise `UserError` if the disk refused some captions; the mark stays."""
    if outcome is not None and outcome.failed:
        place, reason = outcome.failed[0]
        raise UserError(
            f"{len(outcome.failed)} captions could not be written, the first is '{place}': {reason}",
            "Then run the same command again, which finishes what it began, or --undo.",
        )


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _progress(doing: str, total: int) -> tqdm:
    return tqdm(total=total, desc=doing, unit="caption", disable=None, delay=1)
