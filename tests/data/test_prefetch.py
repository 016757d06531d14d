"""Reading ahead: the same items in the same order, before they are asked for, and nothing left behind."""

import threading
from collections.abc import Iterator

import pytest

from library.config.errors import UserError
from library.data import prefetch as prefetching
from library.data.prefetch import NeverCame, prefetch

SECONDS = 10  # far more than any of these waits takes; only a failing test waits so long


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


class Source:
    """Numbers from 0, which knows how many of them have been fetched and by which threads."""

    def __init__(self, count: int, *, fails_at: int | None = None):
        self.fetched = 0
        self.threads: set[str] = set()
        self._count = count
        self._fails_at = fails_at
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        for number in range(self._count):
            if number == self._fails_at:
                raise UserError(f"number {number} is damaged.", "Replace it.")
            with self._changed:
                self.fetched += 1
                self.threads.add(threading.current_thread().name)
                self._changed.notify_all()
            yield number

    def wait_until_fetched(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.fetched >= count, SECONDS)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("num_ahead", [1, 3])
def test_the_items_come_in_their_order_and_the_thread_ends(count: int, num_ahead: int):
    assert list(prefetch(iter(Source(count)), num_ahead)) == list(range(count))
    assert reading_threads() == []


def test_so_many_items_wait_while_one_is_used_and_no_more():
    source = Source(10)
    items = prefetch(iter(source), 3)
    assert next(items) == 0
    source.wait_until_fetched(4)  # without being asked for
    assert next(items) == 1
    source.wait_until_fetched(5)
    items.close()
    assert source.fetched <= 6  # the one in use, and 3 more; the one after them could not have begun
    assert source.threads.isdisjoint({threading.main_thread().name})


def test_an_error_comes_in_its_place_after_the_items_before_it():
    items = prefetch(iter(Source(10, fails_at=2)), 3)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(UserError, match="number 2 is damaged"):
        next(items)
    assert reading_threads() == []


def test_leaving_the_loop_ends_the_thread():
    for number in prefetch(iter(Source(1000)), 2):
        if number == 3:
            break
    assert reading_threads() == []


def test_an_error_of_the_one_who_uses_the_items_ends_the_thread():
    with pytest.raises(KeyboardInterrupt):
        for _ in prefetch(iter(Source(1000)), 2):
            raise KeyboardInterrupt
    for thread in reading_threads():  # until the traceback, which holds the loop, is gone
        thread.join(SECONDS)
    assert reading_threads() == []


def test_a_source_is_not_asked_again_after_its_end():
    class Once:
        """Like a loader with workers, which waits for ever if it is asked for more than there is."""

        def __init__(self) -> None:
            self.numbers = iter([0])
            self.is_over = False

        def __iter__(self) -> "Once":
            return self

        def __next__(self) -> int:
            assert not self.is_over
            for number in self.numbers:
                return number
            self.is_over = True
            raise StopIteration

    assert list(prefetch(Once(), 3)) == [0]


def test_an_item_that_never_comes_ends_the_wait_and_its_thread_holds_nothing_up(monkeypatch, caplog):
    monkeypatch.setattr(prefetching, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(prefetching, "MOST_REPORTS", 5)
    came = threading.Event()

    def numbers() -> Iterator[int]:
        yield 0
        came.wait()

    items = prefetch(numbers(), 2)
    assert next(items) == 0
    with pytest.raises(NeverCame, match=r"the next batch has not come for 0 s: .* Look whether the disk"):
        next(items)
    assert len(caplog.messages) == 3  # after 1, 2 and 4 waits
    [thread] = reading_threads()
    assert thread.daemon
    came.set()
    thread.join(SECONDS)
    assert reading_threads() == []


def test_what_the_thread_begins_with_may_fail():
    def fail() -> None:
        raise UserError("there is no such GPU.", "Choose another.")

    with pytest.raises(UserError, match="there is no such GPU"):
        next(prefetch(iter(Source(2)), 1, begin=fail))
    assert reading_threads() == []


def test_the_thread_begins_with_what_it_is_told():
    begun: list[str] = []
    items = prefetch(iter(Source(1)), 1, begin=lambda: begun.append(threading.current_thread().name))
    assert (list(items), len(begun)) == ([0], 1)
    assert begun[0].startswith("prefetch")
