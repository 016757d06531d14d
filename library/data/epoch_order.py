"""The order of images in an epoch: each exactly once, in batches of one kind, step by step."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass in one process.

    `indices` are positions in the training set, `flips` marks those to flip. The sum of the samples' losses is
    multiplied by `loss_scale`, so that the gradients of a step, averaged over processes, are the mean over all images
    of that step, however they are split. `completes_step` marks the last one before the optimizer steps.
    """

    indices: tuple[int, ...]
    flips: tuple[bool, ...]
    loss_scale: float
    completes_step: bool


@dataclass(frozen=True)
class BatchShape:
    """How the images of an optimizer step are split over micro-batches and processes."""

    batch_size: int = 1
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0


class EpochOrder(Sampler[MicroBatch]):
    """The micro-batches of one process, one epoch per iteration; a function of seed and epoch alone.

    `kinds` holds the kind of each image (its bucket): only images of one kind share a batch. Every epoch is shuffled;
    the last, smaller batch of a kind is kept. Every process computes the same order and takes its part of it.
    """

    def __init__(
        self, kinds: Sequence[Hashable], shape: BatchShape, *, seed: int, num_repeats: int = 1, flip: bool = False
    ):
        self._kinds = kinds
        self._shape = shape
        self._seed = seed
        self._num_repeats = num_repeats
        self._flip = flip
        self._epoch = 0
        self._first_step = 0

    @cached_property  # asked for in every step
    def num_batches(self) -> int:
        """Number of batches in an epoch, over all processes."""
        counts: dict[Hashable, int] = {}
        for kind in self._kinds:
            counts[kind] = counts.get(kind, 0) + self._num_repeats
        return sum(-(-count // self._shape.batch_size) for count in counts.values())

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch; the last one may have fewer batches."""
        return -(-self.num_batches // self._batches_per_step)

    @property
    def _batches_per_step(self) -> int:
        return self._shape.accumulation_steps * self._shape.num_processes

    def start_at(self, epoch: int, first_step: int = 0) -> None:
        """Let the next iteration yield epoch number `epoch` (from 0), starting with its optimizer step `first_step`."""
        self._epoch = epoch
        self._first_step = first_step

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[MicroBatch]:
        random = np.random.default_rng([self._seed, self._epoch])
        batches = self._shuffled_batches(random)
        for step in range(self._first_step, self.steps_per_epoch):
            first = step * self._batches_per_step
            yield from self._part_of_step(batches[first : first + self._batches_per_step])

    def _shuffled_batches(self, random: np.random.Generator) -> list[tuple[tuple[int, bool], ...]]:
        """Return batches of (index, flipped) in the order of the epoch."""
        by_kind: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(self._kinds):
            by_kind.setdefault(kind, []).extend([index] * self._num_repeats)
        batches = []
        for indices in by_kind.values():
            shuffled = [int(index) for index in random.permutation(indices)]
            flips = (
                [bool(flip) for flip in random.random(len(shuffled)) < 0.5] if self._flip else [False] * len(shuffled)
            )
            images = list(zip(shuffled, flips, strict=True))
            size = self._shape.batch_size
            batches += [tuple(images[first : first + size]) for first in range(0, len(images), size)]
        return [batches[position] for position in random.permutation(len(batches))]

    def _part_of_step(self, batches: list[tuple[tuple[int, bool], ...]]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this process in the step that consists of `batches`.

        If there are too few for all processes, those left over repeat one at scale zero: they must take part in the
        exchange of gradients without changing it.
        """
        scale = self._shape.num_processes / sum(len(batch) for batch in batches)
        num_rounds = -(-len(batches) // self._shape.num_processes)
        for turn in range(num_rounds):
            position = turn * self._shape.num_processes + self._shape.process_index
            is_spare = position >= len(batches)
            indices, flips = zip(*batches[0 if is_spare else position], strict=True)
            yield MicroBatch(indices, flips, 0.0 if is_spare else scale, turn == num_rounds - 1)
