"""The images that are measured and not trained: their latents, their batches, and what is read of them."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from accelerate import Accelerator

from library.config.errors import listed
from library.data.caption_tokens import tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import Batch, CaptionedImages
from library.data.epoch_order import MicroBatch
from library.data.fingerprints import Fingerprints
from library.data.image_columns import FoundImages
from library.data.training_columns import TrainingSet
from library.data.training_images import TrainingImage
from library.sdxl.architecture import SdxlModel
from library.training.distribution import main_process_first
from library.training.preparation import images_with_latents
from library.training.progress import Progress
from library.training.resume import check_validation
from library.training.run_options import TrainingOptions
from library.training.validation_texts import Readings, readings_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSet:
    """The images of validation, in batches of one kind, and what is read of each in every condition."""

    images: TrainingSet
    batches: Sequence[MicroBatch]
    timesteps: tuple[int, ...]
    readings: Readings
    batch_source: CaptionedImages

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """Return one of the batches, in host memory."""
        return self.batch_source[micro_batch]


def prepare_validation(
    options: TrainingOptions,
    held_out: FoundImages,
    model: SdxlModel,
    digest: str,
    accelerator: Accelerator,
    progress: Progress,
) -> ValidationSet | None:
    """Return the images that are `held_out` as they are measured, None if there are none; note them in `progress`.

    `digest` is the VAE's. Raise `UserError` where the state that is resumed measured other images.
    """
    with main_process_first(accelerator):
        images = (
            images_with_latents(options, held_out, model.vae, digest, accelerator) if held_out else TrainingSet.of([])
        )
    images = first_batches(images, options.validation.max_validation_steps)
    now = dict(sorted(Fingerprints(images).items()))
    if options.resume.resume is not None:
        for change in check_validation(progress.setting.validation, now, anyway=options.resume.resume_anyway):
            log.info(change)
    progress.setting = replace(progress.setting, validation=now)
    if not images:
        return None
    tokens = tokenizer_for(images.used_subsets)
    readings = readings_of(images, tokens, ablation=options.validation.validation_ablation)
    source = CaptionedImages(images, Captioning(tokens, seed=0, num_steps=0))
    timesteps = options.validation.timesteps(options.timesteps.timestep_range)
    made = ValidationSet(images, batches_of(images), timesteps, readings, source)
    log.info(
        "validation: %d images are held out (%s), %d timesteps, %d conditions",
        *(len(images), listed([image.key for image in images]), len(timesteps), len(readings)),
    )
    return made


def batches_of(images: Sequence[TrainingImage]) -> list[MicroBatch]:
    """Return batches of images of one kind, as large as their data sets have them, in the order of their first image.

    A function of the images alone: however many processes share the batches, they are the same.
    """
    members: dict[object, list[int]] = {}
    for index, image in enumerate(images):
        members.setdefault(image.kind, []).append(index)
    chunks = []
    for indices in members.values():
        size = images[indices[0]].subset.batch_size
        chunks += [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]
    return [_unchanging(indices) for indices in sorted(chunks)]


def first_batches(images: Iterable[TrainingImage], num_batches: int | None) -> TrainingSet:
    """Return the images of the first batches, in their order."""
    training_set = TrainingSet.of(images)
    batches = batches_of(training_set)[:num_batches]
    return training_set.take(np.array(sorted(index for batch in batches for index in batch.indices), np.int64))


def _unchanging(indices: tuple[int, ...]) -> MicroBatch:
    """Return the batch of a visit that is like every other: not flipped, the first of its epoch."""
    size = len(indices)
    return MicroBatch(
        indices,
        occurrences=(0,) * size,
        flips=(False,) * size,
        epoch=1,
        steps_done=0,
        loss_scale=1 / size,
        completes_step=True,
    )
