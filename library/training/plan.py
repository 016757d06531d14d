"""The way through the training set: batches in their order, and how many steps a run takes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch.utils.data import DataLoader

from library.data.dataset import Batch, CaptionedImages, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.subsets import LoaderOptions, TrainingSetOptions
from library.data.text_cache import CachedTexts
from library.data.training_set import TrainingImage
from library.training.run_options import RunOptions
from library.training.state import Progress


@dataclass(frozen=True)
class Course:
    """The batches of one process, and the number of optimizer steps of the whole run."""

    loader: DataLoader[Batch]
    order: EpochOrder
    num_pictures: int
    num_steps: int

    @property
    def num_epochs(self) -> int:
        """Epochs begun in the run."""
        return math.ceil(self.num_steps / self.order.steps_per_epoch)

    def epoch_ended(self, progress: Progress) -> int | None:
        """The epoch (from 1) that ended with the last step, if one did; the end of the run ends its epoch too."""
        if progress.step_in_epoch == 0:
            return progress.epoch or None
        is_over = progress.step_in_epoch >= self.order.steps_per_epoch or progress.step >= self.num_steps
        return progress.epoch + 1 if is_over else None

    def batches(self, progress: Progress) -> Iterable[Batch]:
        """What is left of the epoch that `progress` is in; nothing when all steps are done."""
        if progress.step >= self.num_steps:
            return ()
        self.order.start_at(progress.epoch, progress.step_in_epoch)
        return self.loader

    def __str__(self) -> str:
        return (
            f"{self.num_pictures} pictures in {self.order.num_batches} batches, "
            f"{self.order.steps_per_epoch} steps an epoch, {self.num_steps} steps in {self.num_epochs} epochs"
        )


def make_course(
    images: Sequence[TrainingImage],
    texts: CachedTexts,
    loader_options: LoaderOptions,
    training_set_options: TrainingSetOptions,
    run_options: RunOptions,
    accelerator: Accelerator,
    seed: int,
) -> Course:
    """The course of this process over `images`; `--max_train_epochs`, where given, decides its length."""
    dataset = CaptionedImages(images, loader_options.num_chunks, texts)
    shape = BatchShape(
        batch_size=loader_options.train_batch_size,
        accumulation_steps=run_options.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    order = EpochOrder(
        dataset.kinds,
        shape,
        seed=seed,
        num_repeats=training_set_options.dataset_repeats,
        flip=training_set_options.flip_aug,
    )
    num_steps = run_options.max_train_steps
    if run_options.max_train_epochs is not None:
        num_steps = run_options.max_train_epochs * order.steps_per_epoch
    return Course(make_loader(dataset, order, loader_options, accelerator.device), order, len(images), num_steps)
