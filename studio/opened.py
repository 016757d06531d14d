"""What the studio has open: the set, its undo journal, and what works in the background for it."""

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs

from library.captions.drawn_captions import DrawnPair
from library.config.digests import digest
from library.config.errors import UserError
from library.data.subsets import Subset
from library.editing.caption_set import CaptionSet, Member
from library.editing.caption_writing import Outcome
from library.editing.undo_journal import UndoJournal
from studio.events import Hub
from studio.machines import Machines
from studio.options import MachineOptions
from studio.pictures import Pictures

log = logging.getLogger(__name__)

APP_NAME = "sdxl-two-captions"
_SECONDS_BETWEEN_NEWS = 0.25
_DRAWING_SECONDS = 60.0
_LONGEST_REST = 2.0  # in all: a page that asks again at all news of a large set must not stop what it asks for


class Opened:
    """A set that is open in the studio."""

    def __init__(self, subsets: Sequence[Subset], seed: int, machines: MachineOptions | None = None):
        self.captions = CaptionSet(subsets)
        self.journal = UndoJournal(_journal_path(self.captions))
        self.hub = Hub()
        self.pictures = Pictures(platformdirs.user_cache_path(APP_NAME) / "thumbnails")
        self.machines = Machines(machines or MachineOptions(), partial(self.hub.publish, "machine"))
        self.seed = seed
        self.progress = (0, 0)
        self.edits = threading.Lock()
        """Held while many captions are changed: one such step after the other."""
        self._urgent = 0
        self._nothing_urgent = threading.Condition()
        self._rest_left = _LONGEST_REST
        self._drawing: ProcessPoolExecutor | None = None
        self._is_closing = False

    def start(self) -> None:
        """Begin to read, in a thread."""
        self.hub.start()
        threading.Thread(target=self._read, name="reading captions", daemon=True).start()

    def close(self) -> None:
        """End what works in the background."""
        self._is_closing = True
        self.machines.cancel()
        self.pictures.close()
        if self._drawing is not None:
            self._drawing.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Within the block the reading of captions rests: two threads that work at once are twice as slow."""
        with self._nothing_urgent:
            self._urgent += 1
        try:
            yield
        finally:
            with self._nothing_urgent:
                self._urgent -= 1
                self._nothing_urgent.notify_all()

    def _rest(self) -> None:
        with self._nothing_urgent:
            began = time.monotonic()
            self._nothing_urgent.wait_for(lambda: not self._urgent, self._rest_left)
            self._rest_left = max(0.0, self._rest_left - (time.monotonic() - began))

    def _read(self) -> None:
        self.captions.list_images()
        self.hub.publish("listed")
        told = 0.0

        def tell(done: int, total: int) -> bool:
            nonlocal told
            self.progress = (done, total)
            if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
                told = time.monotonic()
                self.hub.publish("progress", done=done, total=total)
            self._rest()
            return not self._is_closing

        self.captions.load(tell)
        self.hub.publish("loaded")
        self.pictures.tidy()

    def take_in(self, outcome: Outcome, client: str) -> dict[str, Any]:
        """Read what was written, tell every page, and return what happened as JSON."""
        members = self.captions.reread(change.place for change in outcome.written)
        history = self.history()
        self._tell(members, client, history)
        return {
            "what": outcome.what,
            "num_written": len(outcome.written),
            "conflicts": [str(place.path.name if place.key is None else place.key) for place in outcome.conflicts],
            "failed": [problem for _, problem in outcome.failed],
            **history,
        }

    def tell_of_changes(self, members: Sequence[Member], client: str = "") -> None:
        """Tell every page that the captions of some images, or the images, have changed."""
        self._tell(members, client, self.history())

    def _tell(self, members: Sequence[Member], client: str, history: dict[str, Any]) -> None:
        numbers = [member.number for member in members]
        self.hub.publish("changed", ids=numbers[:1000], num=len(numbers), client=client, **history)

    def history(self) -> dict[str, Any]:
        """Return what can be undone and redone, as JSON."""
        undoable, again = self.journal.to_undo(), self.journal.to_redo()
        return {"undo": undoable[0].what if undoable else None, "redo": again[0].what if again else None}

    def draw(self, drawing: Callable[[], list[DrawnPair]]) -> list[DrawnPair]:
        """Draw captions in a worker process. Raise `UserError` as `drawing` does, and if the process is lost."""
        if self._drawing is None:
            self._drawing = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self._drawing.submit(_caught, drawing).result(_DRAWING_SECONDS)()
        except (BrokenProcessPool, TimeoutError) as error:
            self._drawing.shutdown(wait=False, cancel_futures=True)
            self._drawing = None
            raise UserError("the process that draws captions has ended.", "Try again.") from error


def _caught(drawing: Callable[[], list[DrawnPair]]) -> Callable[[], list[DrawnPair]]:
    """Return what returns the result of `drawing` or raises its error, which does not survive the way by itself."""
    try:
        return partial(_returned, drawing())
    except UserError as error:
        return partial(_raised, error.problem, error.remedy)


def _returned(pairs: list[DrawnPair]) -> list[DrawnPair]:
    return pairs


def _raised(problem: str, remedy: str) -> list[DrawnPair]:
    raise UserError(problem, remedy)


def _journal_path(captions: CaptionSet) -> Path:
    places = sorted(str(folder.resolve()) for folder in captions.folders())
    name = digest(["\0".join(places).encode(errors="surrogatepass")], 12).hex()
    return platformdirs.user_state_path(APP_NAME) / "undo" / f"{name}.jsonl"
