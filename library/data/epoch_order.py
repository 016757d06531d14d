"""In which order an epoch visits its images: each as often as it is repeated, in batches of one kind, step by step."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class StepPlaces(NamedTuple):
    """Where the images of a micro-batch stand among the `total` of its step, over all processes: from `first` on.

    `seed` is that of the step, the same in all processes.
    """

    first: int
    total: int
    seed: int


@dataclass(frozen=True)
class MicroBatch:
    """What one process runs through the network at once.

    `indices` are positions in the training set, `occurrences` says which repeat of the image in this epoch each is
    (from 0), `flips` which of them are flipped. `epoch` counts from 1; `steps_done` optimizer steps precede the step
    that the micro-batch belongs to. `loss_scale` is what the sum of its samples' losses is multiplied by, so that the
    gradients of a step, averaged over processes, are the mean over all images of that step however they are split.
    `completes_step` marks the last one before the optimizer. `places` says which of the step's images they are.
    """

    indices: tuple[int, ...]
    occurrences: tuple[int, ...]
    flips: tuple[bool, ...]
    epoch: int
    steps_done: int
    loss_scale: float
    completes_step: bool
    places: StepPlaces | None = None


@dataclass(frozen=True)
class BatchShape:
    """How the images of an optimizer step are split over micro-batches and processes."""

    batch_size: int = 1
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0


_OF_PLACES = 1  # what is drawn from the seed of a step
_Visit = tuple[int, int, bool]  # index, occurrence, flip


class _Epoch(NamedTuple):
    """The visits of an epoch in columns, and where each of its batches, in their order, starts and ends among them."""

    indices: np.ndarray
    occurrences: np.ndarray
    flips: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def visits(self, batch: int) -> list[_Visit]:
        """Return the visits of a batch."""
        place = slice(self.starts[batch], self.ends[batch])
        columns = (self.indices[place].tolist(), self.occurrences[place].tolist(), self.flips[place].tolist())
        return list(zip(*columns, strict=True))


class EpochOrder(Sampler[MicroBatch]):
    """The micro-batches of one process for one epoch at a time; a function of seed and epoch alone.

    `kinds` has the kind of each image (its bucket, or a number): only images of one kind share a batch. `num_repeats`
    and `flip` hold for all images, or for each by its position; `batch_sizes` names the kinds whose batches are not
    those of `shape`. Every epoch is shuffled again; the last, smaller batch of a kind is kept. Every process computes
    the same order and takes its part.
    """

    def __init__(
        self,
        kinds: Sequence[Hashable] | np.ndarray,
        shape: BatchShape,
        *,
        seed: int,
        num_repeats: int | Sequence[int] | np.ndarray = 1,
        flip: bool | Sequence[bool] | np.ndarray = False,
        batch_sizes: Mapping[Hashable, int] | None = None,
    ):
        self._shape = shape
        self._seed = seed
        self._batch_sizes = batch_sizes or {}
        self._repeats = np.broadcast_to(np.asarray(num_repeats, np.int64), len(kinds))
        self._may_flip = np.broadcast_to(np.asarray(flip, np.bool_), len(kinds))
        self._members = _members_of(kinds)
        self._epoch = 0
        self._first_step = 0
        self._steps_done = 0

    @cached_property
    def num_batches(self) -> int:
        """Batches in an epoch, over all processes."""
        return sum(
            -(-int(self._repeats[indices].sum()) // self._batch_size(kind)) for kind, indices in self._members.items()
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may hold fewer batches."""
        return -(-self.num_batches // self._batches_per_step)

    @cached_property
    def _num_visits(self) -> int:
        return int(self._repeats.sum())

    def images_in(self, num_steps: int) -> int:
        """Return how many images the first steps of a run show: exactly after whole epochs, else about."""
        return round(num_steps / self.steps_per_epoch * self._num_visits)

    @property
    def _batches_per_step(self) -> int:
        return self._shape.accumulation_steps * self._shape.num_processes

    def _batch_size(self, kind: Hashable) -> int:
        return self._batch_sizes.get(kind, self._shape.batch_size)

    def start_at(self, epoch: int, first_step: int = 0, *, steps_done: int = 0) -> None:
        """Let the next iteration yield epoch number `epoch` (from 0), from its optimizer step `first_step` on.

        `steps_done` optimizer steps of the run precede it.
        """
        self._epoch = epoch
        self._first_step = first_step
        self._steps_done = steps_done

    def __len__(self) -> int:
        num_batches = max(0, self.num_batches - self._first_step * self._batches_per_step)
        whole, rest = divmod(num_batches, self._batches_per_step)
        return whole * self._shape.accumulation_steps + -(-rest // self._shape.num_processes)

    def __iter__(self) -> Iterator[MicroBatch]:
        random = np.random.default_rng([self._seed, self._epoch])
        epoch = self._shuffled(random)
        for step in range(self._first_step, self.steps_per_epoch):
            first = step * self._batches_per_step
            steps_done = self._steps_done + step - self._first_step
            last = min(first + self._batches_per_step, len(epoch.starts))
            yield from self._part_of_step([epoch.visits(number) for number in range(first, last)], steps_done)

    def _shuffled(self, random: np.random.Generator) -> "_Epoch":
        """Return the visits of an epoch, and its batches in their order."""
        parts, starts, ends, num_visits = [], [], [], 0
        for kind, members in self._members.items():
            repeats = self._repeats[members]
            order = random.permutation(int(repeats.sum()))
            indices = np.repeat(members, repeats)[order]
            occurrences = _counted_up(repeats)[order]
            flips = self._may_flip[indices]
            if self._may_flip[members].any():
                flips = flips & (random.random(len(order)) < 0.5)
            size = self._batch_size(kind)
            firsts = np.arange(0, len(order), size)
            starts.append(num_visits + firsts)
            ends.append(num_visits + np.minimum(firsts + size, len(order)))
            num_visits += len(order)
            parts.append((indices, occurrences, flips))
        shuffled = random.permutation(sum(map(len, starts)))
        indices, occurrences, flips = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _Epoch(indices, occurrences, flips, np.concatenate(starts)[shuffled], np.concatenate(ends)[shuffled])

    def _part_of_step(self, batches: list[list[_Visit]], steps_done: int) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches of the step that consists of `batches`.

        Where the batches do not go round, the processes left over repeat one at scale zero: they must take part in
        the exchange of gradients, and must not change it.
        """
        ends = np.cumsum([len(batch) for batch in batches]).tolist()
        scale = self._shape.num_processes / ends[-1]
        seed = int(np.random.SeedSequence([self._seed, steps_done, _OF_PLACES]).generate_state(1, np.uint32)[0])
        num_rounds = -(-len(batches) // self._shape.num_processes)
        for turn in range(num_rounds):
            position = turn * self._shape.num_processes + self._shape.process_index
            is_spare = position >= len(batches)
            batch, end = (batches[0], ends[0]) if is_spare else (batches[position], ends[position])
            indices, occurrences, flips = zip(*batch, strict=True)
            yield MicroBatch(
                indices,
                occurrences,
                flips,
                epoch=self._epoch + 1,
                steps_done=steps_done,
                loss_scale=0.0 if is_spare else scale,
                completes_step=turn == num_rounds - 1,
                places=StepPlaces(end - len(batch), ends[-1], seed),
            )


def _members_of(kinds: Sequence[Hashable] | np.ndarray) -> dict[Hashable, np.ndarray]:
    """Return the positions of the images of each kind, the kinds in the order of their first images."""
    numbers: dict[Hashable, int] = {}
    if isinstance(kinds, np.ndarray):
        names, firsts, codes = np.unique(kinds, return_index=True, return_inverse=True)
        in_order = [(names[number].item(), number) for number in np.argsort(firsts)]
    else:
        codes = np.fromiter((numbers.setdefault(kind, len(numbers)) for kind in kinds), np.int64, len(kinds))
        in_order = list(numbers.items())
    positions = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return {name: positions[number] for name, number in in_order}


def _counted_up(repeats: np.ndarray) -> np.ndarray:
    """Return 0 .. n-1 for each n of `repeats`, one after another."""
    return np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
