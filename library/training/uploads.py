"""Saved models and states on their way to the hub: beside the training, tried again, and no reason to end it."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from library.training.hub_options import HubOptions
from library.training.progress import STATE_SUFFIX

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds between attempts, twice as long each time. The end of a run begins with the first again."""
ATTEMPTS_AT_END = 5


class Destination(Protocol):
    """The hub, as `hub.Hub` asks it."""

    def make_repository(self) -> None:
        """Make the repository unless it exists."""

    def upload(self, path: Path) -> None:
        """Upload a file or a folder."""

    def is_final(self, error: Exception) -> bool:
        """Return whether another attempt would end the same way."""

    def reason(self, error: Exception) -> str:
        """Return why it failed, in a few words."""


class Uploads:
    """Uploads what is added, in its order, by a thread; `hub` None uploads nothing.

    An upload that fails is reported once and tried again while the run continues, with longer and longer pauses. What
    the hub refuses for good, what is removed before its turn, and what is left at the end is named.
    """

    def __init__(
        self,
        options: HubOptions,
        hub: Destination | None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._options = options
        self._hub = hub
        self._waiting = waiting
        self._changed = threading.Condition()
        self._queue: list[Path] = []
        self._current: Path | None = None
        self._tried: set[Path] = set()  # at least once since they were added
        self._is_ending = self._is_over = False
        self._attempts: Counter[Path] = Counter()
        self._pause = FIRST_PAUSE
        self._is_reported = False
        self._has_repository = False
        self.uploaded: list[Path] = []
        self.failed: dict[Path, str] = {}
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """Upload a file or folder that is complete; without --async_upload, wait for the first attempt."""
        is_state = path.is_dir() and path.name.endswith(STATE_SUFFIX)
        if self._hub is None or (is_state and not self._options.save_state_to_huggingface):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        with self._changed:
            self._tried.discard(path)
            self.failed.pop(path, None)
            if path not in self._queue or (path == self._current and self._queue.count(path) == 1):
                self._queue.append(path)  # also while the one before, of the same name, is half read
            self._changed.notify_all()
            if not self._options.async_upload:
                self._changed.wait_for(lambda: path in self._tried or path not in self._queue)

    @contextmanager
    def finished_after_errors(self) -> Iterator[None]:
        """Within the block, an error ends the run when the uploads are over."""
        try:
            yield
        except Exception:
            self.finish()
            raise

    def finish(self) -> None:
        """Wait for the uploads, a few attempts for each; name what is not uploaded. A signal ends the wait."""
        if self._hub is None:
            return
        try:
            with self._waiting(), self._changed:
                if self._queue:
                    log.info("waiting for the upload of %d files; Ctrl-C ends the run without it", len(self._queue))
                self._is_ending = True
                self._pause = FIRST_PAUSE
                self._attempts.clear()
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._queue)
        finally:
            with self._changed:
                self._is_over = True
                self.failed |= dict.fromkeys(self._queue, "the run ended before")
                self._queue.clear()
                self._changed.notify_all()
            self._name_what_failed()

    def _name_what_failed(self) -> None:
        for path, reason in self.failed.items():
            place = self._options.place_of(path.name)
            kind = "" if place.kind == "model" else f" --repo-type {place.kind}"
            log.warning(
                '\'%s\' is not uploaded (%s). It is kept; upload it with: hf upload %s "%s" "%s"%s',
                *(path, reason, place.repository, path, place.path, kind),
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_ending)
                if not self._queue:
                    return
                path = self._current = self._queue[0]
            error = self._attempt(path)
            with self._changed:
                self._current = None
                self._tried.add(path)
                if self._queue:
                    self._queue.pop(0)
                    self._note(path, error)
                self._changed.notify_all()

    def _attempt(self, path: Path) -> Exception | None:
        assert self._hub is not None
        try:
            if not self._has_repository:
                self._hub.make_repository()
                self._has_repository = True
            self._hub.upload(path)
        except Exception as error:  # noqa: BLE001 (whatever it is, the run continues)
            return error
        return None

    def _note(self, path: Path, error: Exception | None) -> None:
        """Note how the attempt ended; if it is to be repeated, put it behind the others and pause."""
        assert self._hub is not None
        self._attempts[path] += 1
        if error is None:
            self.uploaded.append(path)
            self._is_reported, self._pause = False, FIRST_PAUSE
            log.info("uploaded '%s' to '%s'", path.name, self._options.place_of(path.name))
        elif not path.exists():
            log.warning("'%s' was removed before it was uploaded, as newer saves have replaced it", path.name)
        elif self._hub.is_final(error) or (self._is_ending and self._attempts[path] >= ATTEMPTS_AT_END):
            self.failed[path] = self._hub.reason(error)
        else:
            if path not in self._queue:
                self._queue.append(path)
            self._wait_to_repeat(path, error)

    def _wait_to_repeat(self, path: Path, error: Exception) -> None:
        assert self._hub is not None
        if not self._is_reported:
            self._is_reported = True
            log.warning(
                "'%s' is not uploaded yet (%s). It is kept; uploading is tried again while training continues and at "
                "the end.",
                *(path.name, self._hub.reason(error)),
            )
        self._changed.notify_all()
        was_ending = self._is_ending
        self._changed.wait_for(lambda: self._is_over or self._is_ending != was_ending, self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
