"""Draw images of a finished model: prompts to records, records to batches, batches to files."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from library.config.errors import UserError
from library.samples.drawing import try_to_draw, unless_it_fails
from library.samples.picture_files import PictureRecord, save_picture
from library.samples.prompts import MAX_SEED, SamplePrompt
from library.samples.sample_grid import SampleGrid
from library.samples.sampler import SamplingNetworks, draw_latents_together, picture_of_latents
from library.sdxl.prediction import SDXL_PREDICTION, Prediction
from library.sdxl.tokenizers import num_chunks_needed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Defaults:
    """What holds for a prompt that does not say it; `seed` None draws one for each image."""

    width: int
    height: int
    sampler: str
    seed: int | None
    model_name: str
    prediction: Prediction = SDXL_PREDICTION


class Folder:
    """A folder of drawn images: each gets a name that no file has. Raise `UserError` if it cannot be made."""

    def __init__(self, path: Path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder '{path}': {error.strerror or error}.", "Check --outdir."
            ) from error
        self._path = path
        self._numbers = count()
        self._time = f"{datetime.now():%Y%m%d%H%M%S}"

    def save(self, image: Image.Image, record: PictureRecord, texts: dict[str, str] | None = None) -> Path:
        """Write the image as `im_time_number_seed.png` and return its path. Raise `CannotWrite` if that fails."""
        for number in self._numbers:
            path = self._path / f"im_{self._time}_{number:03d}_{record.seed}.png"
            if not path.exists():
                save_picture(path, image, record, texts)
                return path
        raise AssertionError("numbers do not end")


def records_of(
    prompts: Sequence[SamplePrompt], defaults: Defaults, images_per_prompt: int, fresh_seeds: Iterator[int]
) -> list[PictureRecord]:
    """Return what to draw, `images_per_prompt` of each prompt in turn.

    They have the seeds d, d + 1, ... of a prompt with `--d`, else those from `defaults.seed` on, else fresh ones.
    """
    records = []
    for prompt in prompts:
        first = defaults.seed if prompt.seed is None else prompt.seed
        for number in range(images_per_prompt):
            seed = next(fresh_seeds) if first is None else (first + number) % (MAX_SEED + 1)
            records.append(record_of(prompt, defaults, seed))
    return records


def fresh_seeds() -> Iterator[int]:
    """Yield seeds that nobody asked for, as many as are taken."""
    while True:
        yield int.from_bytes(os.urandom(4), "little")


def record_of(prompt: SamplePrompt, defaults: Defaults, seed: int) -> PictureRecord:
    """Return how to draw one image of a prompt."""
    return PictureRecord(
        prompt=prompt,
        sampler=prompt.sampler or defaults.sampler,
        width=prompt.width or defaults.width,
        height=prompt.height or defaults.height,
        seed=seed,
        step=None,
        model_name=defaults.model_name,
        prediction=defaults.prediction,
    )


def draw_records(networks: SamplingNetworks, records: Sequence[PictureRecord], batch_size: int, folder: Folder) -> int:
    """Draw and save every image; return the number of those that failed, each after a warning."""
    num_drawn = num_saved = 0
    for batch in _batches(records, batch_size):
        log.info("drawing image %s of %d", _numbers(num_drawn, len(batch)), len(records))
        for record, image in zip(batch, _images(networks, batch), strict=True):
            num_saved += image is not None
            if image is not None:
                log.info("%s", folder.save(image, record))
        num_drawn += len(batch)
    return len(records) - num_saved


def draw_grid(
    networks: SamplingNetworks, grid: SampleGrid, defaults: Defaults, seeds: Iterator[int], folder: Folder
) -> int:
    """Draw and save the grid as the trainer does; return the number of cells that failed, each after a warning.

    All cells have the seed of the first prompt, else that of `defaults`, else a fresh one.
    """
    [first] = records_of([grid.first], defaults, 1, seeds)
    prompts = grid.prompts()
    images = []
    for number, prompt in enumerate(prompts, start=1):
        log.info("drawing image %d of the %d of the grid", number, len(prompts))
        where = f"the image of L '{prompt.prompt_l}' with G '{prompt.prompt_g}' in the grid"
        images.append(try_to_draw(networks, record_of(prompt, defaults, first.seed), where, grid.num_chunks))
    log.info("%s", folder.save(grid.table(images), first, grid.texts()))
    return images.count(None)


def _batches(records: Sequence[PictureRecord], batch_size: int) -> Iterator[list[PictureRecord]]:
    """Yield neighbours that can be drawn in one batch: of one size, sampler, length and guidance.

    Their captions need equally many chunks of 75 tokens, so that none is padded for the sake of another.
    """
    batch: list[PictureRecord] = []
    for record in records:
        if batch and (len(batch) == batch_size or _kind(record) != _kind(batch[0])):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def _kind(record: PictureRecord) -> tuple[object, ...]:
    prompt = record.prompt
    texts = (prompt.prompt_l, prompt.prompt_g, prompt.negative_l, prompt.negative_g)
    return (
        record.width,
        record.height,
        record.sampler,
        prompt.num_inference_steps,
        prompt.guidance_scale,
        prompt.guidance_rescale,
        max(map(num_chunks_needed, texts)),
    )


def _images(networks: SamplingNetworks, batch: Sequence[PictureRecord]) -> list[Image.Image | None]:
    """Return the images of a batch; one by one if the device has no memory for all of them at once."""
    if len(batch) > 1:
        try:
            latents = draw_latents_together(
                networks,
                [record.prompt for record in batch],
                sampler=batch[0].sampler,
                width=batch[0].width,
                height=batch[0].height,
                seeds=[record.seed for record in batch],
            )
        except (torch.OutOfMemoryError, MemoryError):
            log.warning("out of memory for %d images at once: they are drawn one by one", len(batch))
        else:
            return [
                unless_it_fails(partial(picture_of_latents, networks, each[None]), record, _where(record))
                for each, record in zip(latents, batch, strict=True)
            ]
    return [try_to_draw(networks, record, _where(record)) for record in batch]


def _where(record: PictureRecord) -> str:
    return f"the image of prompt {record.prompt.line} with seed {record.seed}"


def _numbers(num_before: int, num_now: int) -> str:
    first, last = num_before + 1, num_before + num_now
    return str(first) if first == last else f"{first} to {last}"
