"""What a start and a step do grows with the set as one pass over columns does, or not at all: counted, not timed."""

import itertools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.linked_set import BUCKETS, write_linked_set
from library.data.fingerprints import Fingerprints
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae
from library.training.learner import Learner
from library.training.preparation import make_order
from library.training.run_options import RunOptions
from tests.training_images import captioned, read_set

SMALL, LARGE = 100, 1000
GROWTH = LARGE // SMALL
MOST_CALLS_OF_AN_IMAGE = 150  # about 100 of functions in C; most add its texts to the columns
RULE = BucketRule(BUCKETS[0], 64, 128, 32, no_upscale=False)
_counts: Counter[str] = Counter()
_READS = {"open", "os.listdir", "os.scandir"}


def _audit(event: str, _: object) -> None:
    if event in _READS:
        _counts[event] += 1


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tiny_sdxl) -> dict[int, Path]:
    """Prepared sets of both sizes, whose files are old enough to be known by their times."""
    folder, digest = tmp_path_factory.mktemp("linked"), vae_digest(load_vae(str(tiny_sdxl), None))
    for number in (SMALL, LARGE):
        write_linked_set(folder / str(number), number, digest)
        for path in (folder / str(number)).glob("*.*"):
            os.utime(path, (1.7e9, 1.7e9 + 0.5))
    sys.addaudithook(_audit)
    return {number: folder / str(number) for number in (SMALL, LARGE)}


def _read(folder: Path):
    options = TrainingSetOptions(train_data_dir=folder / "images", in_json=folder / "meta_lat.json")
    return read_set(options, RULE, _digest_in(folder))


def _digest_in(folder: Path) -> str:
    from library.data.latent_cache import read_cache

    return read_cache(next(folder.glob("*.npz"))).vae_digest


@contextmanager
def counting_calls() -> Iterator[Counter[str]]:
    """Count calls of Python functions, and of functions written in C, within the block, in this thread."""
    found: Counter[str] = Counter()

    def profile(_: object, event: str, __: object) -> None:
        if event in ("call", "c_call"):
            found[event] += 1

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _work_of(act: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Return the calls and the reads of something."""
    _counts.clear()
    with counting_calls() as calls:
        act()
    return calls, Counter(_counts)


def test_a_start_opens_as_many_files_for_any_set_and_passes_over_it_once(sets, monkeypatch):
    stats: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **named: stats.append(str(path)) or stat(path, **named))
    work = {}
    for number, folder in sets.items():
        _read(folder)  # makes the index

        def start(folder: Path = folder) -> None:
            images = _read(folder)
            assert images.all_have_latents
            Fingerprints(images)
            make_order(images, RunOptions(), 1, num_processes=1, process_index=0).start_at(0)

        stats.clear()
        work[number] = *_work_of(start), sum(path.endswith((".png", ".npz")) for path in stats)
    (few_calls, few_reads, few_stats), (many_calls, many_reads, many_stats) = work[SMALL], work[LARGE]
    assert few_reads == many_reads
    assert (few_stats, many_stats) == (2 * SMALL, 2 * LARGE)
    for event, count in many_calls.items():
        assert count < GROWTH * few_calls[event]  # a line, and what does not grow
        assert count - few_calls[event] < MOST_CALLS_OF_AN_IMAGE * (LARGE - SMALL)


def test_a_batch_is_made_by_as_many_calls_and_reads_in_any_set(sets):
    work = {}
    for number, folder in sets.items():
        images = _read(folder)
        dataset = captioned(images)
        order = make_order(images, RunOptions(), 1, num_processes=1, process_index=0)
        order.start_at(0)
        batches = iter(order)
        for _ in range(3):
            dataset[next(batches)]

        def visit(dataset=dataset, batches=batches) -> None:
            dataset[next(batches)]

        work[number] = _work_of(visit)
    few, many = work[SMALL], work[LARGE]
    assert few[1] == many[1] == {"open": 1}
    assert few == many


@pytest.mark.slow
@pytest.mark.trains
def test_a_step_of_a_run_is_as_many_calls_in_any_set(sets, tiny_sdxl, train, monkeypatch, tmp_path):
    step = Learner.step
    between: list[int] = []
    found: Counter[str] = Counter()
    main = threading.get_ident()

    def profile(_: object, event: str, __: object) -> None:
        if event == "call" and threading.get_ident() == main:
            found[event] += 1

    def counted(*arguments: object, **named: object) -> object:
        between.append(found["call"])
        sys.setprofile(profile)
        return step(*arguments, **named)

    monkeypatch.setattr(Learner, "step", counted)
    work = {}
    for number, folder in sets.items():
        between.clear()
        flags = (f"--in_json={folder / 'meta_lat.json'}", f"--train_data_dir={folder / 'images'}")
        train(*flags, "--resolution=96,96", "--max_train_steps=8")
        sys.setprofile(None)
        work[number] = [after - before for before, after in itertools.pairwise(between[2:])]
    few, many = (sorted(each)[len(each) // 2] for each in work.values())
    assert abs(many - few) < SMALL / 2, work  # waiting for the thread that prefetches takes a few calls more or less
