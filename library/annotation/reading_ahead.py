"""Batches of images for a model: read by threads, made ready by another, while the model works on the last one."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from library.config.errors import UserError
from library.data.prefetch import prefetch

_MOST_THREADS = 4  # unless asked for more
_BATCHES_READ_AHEAD = 2
_BATCHES_READY = 2


class Described(NamedTuple):
    """What a model says of an image: the text to write, and its tags if it is made of tags.

    A text that is not to be written is a `refusal`, or empty. `is_cut` says that the model had more to say.
    """

    text: str
    tags: tuple[str, ...] = ()
    is_refusal: bool = False
    is_cut: bool = False
    details: str = ""


class Machine(Protocol):
    """What writes captions. `batch_size` is the one that it was made for, or None if it takes any."""

    batch_size: int | None

    def load(self, path: Path) -> Any:
        """Return what the model needs of one image; called by several threads. Raise `UserError`."""

    def prepare(self, loaded: Sequence[Any]) -> Any:
        """Return what the model needs of a batch; called by one thread, ahead of its use."""

    def describe(self, prepared: Any) -> list[Described]:
        """Return what the model says of each image of a batch."""


class Ready(NamedTuple):
    """A batch for the model, and the images that could not be read, with the reason."""

    images: list[Path]
    prepared: Any
    failed: list[tuple[Path, UserError]]


def num_reading_threads(wanted: int | None) -> int:
    """Return how many threads read images; None is up to four, and one is the least that reads at all."""
    return min(_MOST_THREADS, os.cpu_count() or 1) if wanted is None else max(1, wanted)


def batches_ahead(images: Sequence[Path], machine: Machine, batch_size: int, num_threads: int) -> Iterator[Ready]:
    """Yield the batches of `images` in their order, some of them ready before they are asked for."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reading")
    try:
        yield from prefetch(_ready(_loading(images, machine, batch_size, pool), machine), _BATCHES_READY)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nobody waits for what was only to be read


def _loading(
    images: Sequence[Path], machine: Machine, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Path, "Future[Any]"]]]:
    waiting: deque[list[tuple[Path, Future[Any]]]] = deque()
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        waiting.append([(image, pool.submit(machine.load, image)) for image in batch])
        if len(waiting) > _BATCHES_READ_AHEAD:
            yield waiting.popleft()
    yield from waiting


def _ready(loading: Iterator[list[tuple[Path, "Future[Any]"]]], machine: Machine) -> Iterator[Ready]:
    for batch in loading:
        loaded, failed = [], []
        for image, future in batch:
            try:
                loaded.append((image, future.result()))
            except UserError as error:
                failed.append((image, error))
        prepared = machine.prepare([each for _, each in loaded]) if loaded else None
        yield Ready([image for image, _ in loaded], prepared, failed)
