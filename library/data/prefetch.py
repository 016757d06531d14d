"""Items fetched a few ahead of their use by a thread, in their order."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
_END = object()

log = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
"""How long an item may take before the wait for it is reported, the first time and each time after."""


def prefetch(items: Iterator[Item], num_ahead: int, *, begin: Callable[[], object] | None = None) -> Iterator[Item]:
    """Yield the same items in the same order, up to `num_ahead` of them fetched before they are asked for.

    One thread fetches them, after it has called `begin`, so that `items` need not be thread-safe. What fetching raises
    is raised here, in its place of the order. Leaving a `for` loop over them waits for the item being fetched and
    fetches no more.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=begin)
    until_over = (item for item in items)  # may be asked again after its end, as not every iterator may be
    fetching = deque(thread.submit(next, until_over, _END) for _ in range(num_ahead))
    try:
        while (item := _fetched(fetching.popleft())) is not _END:
            fetching.append(thread.submit(next, until_over, _END))
            yield item  # type: ignore[misc]  # mypy does not see that the end is not among them
    finally:
        thread.shutdown(cancel_futures=True)


def _fetched(future: "Future[Item]") -> Item:
    """Wait for an item, and report a wait that does not end."""
    minutes = 0
    while not wait([future], REPORT_SECONDS).done:
        minutes += 1
        if minutes & (minutes - 1) == 0:  # after 1, 2, 4, 8 ...
            log.warning(
                "waiting for the next batch for %.0f s: is the disk with the images there?", minutes * REPORT_SECONDS
            )
    return future.result()
