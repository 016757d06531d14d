"""Items fetched a few ahead of their use by a thread, in their order."""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from library.config.errors import UserError

Item = TypeVar("Item")
_END = object()

log = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
"""How long an item may take before the wait for it is reported, the first time and each time after."""
MOST_REPORTS = 30
"""How often that time may pass before the wait is given up."""

EXIT_SECONDS = 5.0
"""How long the end of the process waits for the item being fetched."""


class NeverCame(UserError):
    """An item was waited for in vain."""


def prefetch(items: Iterator[Item], num_ahead: int, *, begin: Callable[[], object] | None = None) -> Iterator[Item]:
    """Yield the same items in the same order, up to `num_ahead` of them fetched before they are asked for.

    One thread fetches them, after it has called `begin`, so that `items` need not be thread-safe. What fetching raises
    is raised here, in its place of the order. Leaving a `for` loop over them waits for the item being fetched and
    fetches no more. Raise `NeverCame` if an item takes half an hour; its thread is left behind and holds nothing up.
    """
    until_over = (item for item in items)  # may be asked again after its end, as not every iterator may be
    thread = _Fetcher(lambda: next(until_over, _END), begin)
    fetching = deque(thread.submit() for _ in range(num_ahead))
    try:
        while (item := _fetched(fetching.popleft())) is not _END:
            fetching.append(thread.submit())
            yield item
    except NeverCame:
        thread.has_to_end = False
        raise
    finally:
        thread.end(fetching)


class _Fetcher:
    """A thread that fetches an item for each `submit`. Unlike an executor's, it does not keep the process alive."""

    def __init__(self, fetch: Callable[[], Any], begin: Callable[[], object] | None):
        self._fetch = fetch
        self._begin = begin
        self._asked: SimpleQueue[Future[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._is_over = False
        self.has_to_end = True
        self._thread.start()
        atexit.register(self._end_with_the_process)

    def submit(self) -> "Future[Any]":
        future: Future[Any] = Future()
        self._asked.put(future)
        return future

    def end(self, unused: "deque[Future[Any]]") -> None:
        for future in unused:
            future.cancel()
        self._asked.put(None)
        if self.has_to_end:
            self._thread.join()
        atexit.unregister(self._end_with_the_process)

    def _end_with_the_process(self) -> None:
        """Let the thread end where an error has left it: Python would unwind it within torch, which then aborts."""
        self._is_over = True
        self._asked.put(None)
        self._thread.join(EXIT_SECONDS)

    def _run(self) -> None:
        begin, self._begin = self._begin, None
        while (future := self._asked.get()) is not None and not self._is_over:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if begin is not None:
                    begin()
                    begin = None
                future.set_result(self._fetch())
            except BaseException as error:  # noqa: BLE001 (raised where the item is asked for)
                future.set_exception(error)
            del future  # or its item would stay until the next is asked for


def _fetched(future: "Future[Any]") -> Any:
    """Wait for an item, and report a wait that does not end."""
    num_reports = 0
    while not wait([future], REPORT_SECONDS).done:
        num_reports += 1
        seconds = num_reports * REPORT_SECONDS
        if num_reports >= MOST_REPORTS:
            raise NeverCame(
                f"the next batch has not come for {seconds:.0f} s: a disk, or a worker process that reads images, does"
                " not answer.",
                "Look whether the disk with the images is there, and start again.",
            )
        if num_reports & (num_reports - 1) == 0:  # after 1, 2, 4, 8 ...
            log.warning("waiting for the next batch for %.0f s: is the disk with the images there?", seconds)
    return future.result()
