"""The steps of a run: the batches of each, where epochs end, where a run continues and where it stops."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from library.data.dataset import Batch
from library.data.epoch_order import EpochOrder
from library.training.accelerator import start_step
from library.training.progress import Progress


@dataclass(frozen=True)
class Occasion:
    """Where a run is when its events are called: after optimizer step `step`; 0 is before the first one.

    `epoch_ended` is the epoch (from 1) that ended with the step, if one did; the end of the run ends its epoch too.
    `is_resumed`: the run continues here, and some of what is due may have been done before it stopped.
    """

    step: int
    epoch_ended: int | None = None
    is_last: bool = False
    is_resumed: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step (`number` from 1): its micro-batches on the device, and the generators of noise of each."""

    number: int
    batches: Iterator[Batch]
    generators: Callable[[Batch], Sequence[torch.Generator]]
    occasion: Occasion


@dataclass(frozen=True)
class Plan:
    """The steps of one process. `loader` yields an epoch of batches in the order of `order`."""

    loader: Iterable[Batch]
    order: EpochOrder
    num_images: int
    num_steps: int
    device: torch.device
    process_index: int

    @property
    def num_epochs(self) -> int:
        """Number of epochs begun in the run."""
        return math.ceil(self.num_steps / self.order.steps_per_epoch)

    def steps(self, progress: Progress, until: Callable[[], bool]) -> Iterator[Step]:
        """Yield the steps from `progress` to the end of the run, or until `until()` is true before one of them.

        Whoever runs a step exhausts its batches and then calls `progress.advance()`; epochs are counted here.
        """
        while progress.step < self.num_steps:
            if progress.step_in_epoch >= self.order.steps_per_epoch:  # more, if --resume_anyway shortened the epochs
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            self.order.start_at(progress.epoch, progress.step_in_epoch, steps_done=progress.step)
            batches = (batch for batch in self.loader)
            while progress.step < self.num_steps and progress.step_in_epoch < self.order.steps_per_epoch:
                if until():
                    return
                yield self._next_step(progress, batches)

    def occasion(self, progress: Progress, *, is_resumed: bool) -> Occasion:
        """Return the occasion of a run that is at `progress` and takes no step there."""
        return Occasion(
            progress.step, self._epoch_ended(progress), is_last=progress.step >= self.num_steps, is_resumed=is_resumed
        )

    def _next_step(self, progress: Progress, batches: Iterator[Batch]) -> Step:
        number = progress.step + 1
        ends_epoch = progress.step_in_epoch + 1 >= self.order.steps_per_epoch or number >= self.num_steps
        occasion = Occasion(number, progress.epoch + 1 if ends_epoch else None, is_last=number >= self.num_steps)
        generators = start_step(progress.seed, number, self.process_index, progress.noise_by)
        return Step(number, self._batches_of_step(batches), generators, occasion)

    def _batches_of_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch.to(self.device)
            if batch.completes_step:
                return

    def _epoch_ended(self, progress: Progress) -> int | None:
        if progress.step_in_epoch == 0:
            return progress.epoch or None
        is_over = progress.step_in_epoch >= self.order.steps_per_epoch or progress.step >= self.num_steps
        return progress.epoch + 1 if is_over else None

    def __str__(self) -> str:
        return (
            f"{self.num_images} images in {self.order.num_batches} batches, "
            f"{self.order.steps_per_epoch} steps per epoch, {self.num_steps} steps in {self.num_epochs} epochs"
        )
