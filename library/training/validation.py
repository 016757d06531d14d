"""Measure the loss on images that are not trained when it is due, and what each encoder is worth."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from library.config.digests import digest
from library.config.errors import listed
from library.data.dataset import Batch
from library.data.epoch_order import MicroBatch
from library.data.validation_options import ValidationOptions
from library.diffusion.objective import Objective
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.device_copies import to_device
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import TextConditioning
from library.training.ablation import BOTH, Losses, sentences
from library.training.distribution import gathered
from library.training.failures import explained_out_of_memory
from library.training.learner import Learner
from library.training.offload import on_device
from library.training.plan import Occasion
from library.training.progress import Progress
from library.training.validation_log import ValidationLog
from library.training.validation_set import ValidationSet
from library.training.validation_texts import conditioning, encodings_g, encodings_l

if TYPE_CHECKING:
    from library.training.tracking import Tracker

log = logging.getLogger(__name__)

TRAINED = ""
"""The set of weights that is trained; the curves of others have its name in theirs."""

WeightSets = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""What puts each set of weights in place within a block: "" those that a saved model has, "ema" their average."""


class Validation:
    """Measures the loss on the validation set when it is due: with the same noise for every set of weights.

    Every process calls the event and takes its part of the batches; what is found does not depend on how many there
    are. Training is not touched: nothing random is drawn that training draws, and the networks are left as they were.
    A validation that a stop interrupts reports nothing; the resumed run does it again, since `progress` tells that it
    is missing.
    """

    def __init__(
        self,
        options: ValidationOptions,
        held_out: ValidationSet,
        *,
        learner: Learner,
        objective: Objective,
        vae: nn.Module,
        latents_of: Callable[[Batch], torch.Tensor],
        tracker: "Tracker",
        figures: ValidationLog,
        progress: Progress,
        is_stopping: Callable[[], bool],
        weight_sets: WeightSets,
    ):
        self._options = options
        self._set = held_out
        self._learner = learner
        self._objective = objective
        self._vae = vae
        self._latents_of = latents_of
        self._tracker = tracker
        self._figures = figures
        self._progress = progress
        self._is_stopping = is_stopping
        self._weight_sets = weight_sets
        self._encoded_l = encodings_l(held_out.readings)
        self._encoded_g = encodings_g(held_out.readings)

    def after_step(self, occasion: Occasion, report: object = None) -> None:
        """Validate if it is due; a run that was resumed here only if it has not been done."""
        due = self._options.is_due(occasion.step, occasion.epoch_ended, is_last=occasion.is_last)
        if not due or (occasion.is_resumed and self._progress.validated_step == occasion.step):
            return
        started = time.perf_counter()
        found: dict[str, Losses] = {}
        with self._tracker.untimed():
            for name, weights in self._weight_sets.items():
                with weights():
                    losses = self._measured(name)
                if losses is None:
                    log.info("step %d: the run stops, the validation is left to the resumed run", occasion.step)
                    return
                found[name] = losses
        self._progress.validated_step = occasion.step
        self._report(occasion, found, time.perf_counter() - started)

    def _report(self, occasion: Occasion, found: Mapping[str, Losses], seconds: float) -> None:
        for name, losses in found.items():
            of_weights = "" if name == TRAINED else f" of the {name} weights"
            loss, num_images = losses.mean(BOTH), len(self._set.images)
            log.info(
                "step %d: validation loss%s %.4f, %d images, %.1f s",
                occasion.step,
                of_weights,
                loss,
                num_images,
                seconds,
            )
            self._warn_of_bad(occasion.step, losses)
            self._figures.add(occasion.step, "" if name == TRAINED else f"_{name}", losses)
            if occasion.is_last and self._options.validation_ablation:
                for sentence in sentences(losses):
                    log.info("%s%s", f"{of_weights.strip()}: " if of_weights else "", sentence)

    def _warn_of_bad(self, step: int, losses: Losses) -> None:
        bad = ~np.isfinite(losses.of[BOTH]).all(axis=1)
        if bad.any():
            keys = [image.key for image, is_bad in zip(self._set.images, bad, strict=True) if is_bad]
            log.warning("step %d: the validation loss is NaN or Inf for %s", step, listed(keys))

    @torch.no_grad()
    def _measured(self, name: str) -> Losses | None:
        """Return the losses with the weights that the networks have now, None if the run is to stop."""
        learner, device = self._learner, self._learner.accelerator.device
        has_pixels = not all(image.has_latents for image in self._set.images)
        networks = (learner.unet, learner.text_encoder_l, learner.text_encoder_g)
        with _evaluating(*networks), explained_out_of_memory("in validation"):
            self._encode_texts()
            with on_device(device, *([self._vae] if has_pixels else [])):
                parts = self._measured_part(name)
        if parts is None:
            return None
        shape = len(self._set.images), len(self._set.timesteps)
        losses = {condition: np.full(shape, np.nan) for condition in self._set.readings}
        for indices, measured in gathered(parts):
            for condition, of_batch in measured.items():
                losses[condition][list(indices)] = of_batch
        return Losses(self._set.timesteps, losses)

    def _encode_texts(self) -> None:
        """Encode the texts of validation: those of a frozen encoder once for the whole run."""
        learner, device = self._learner, self._learner.accelerator.device
        for name, encodings, network in (
            ("text_encoder_l", self._encoded_l, learner.text_encoder_l),
            ("text_encoder_g", self._encoded_g, learner.text_encoder_g),
        ):
            if name in learner.trained or not encodings.is_complete:
                with on_device(device, network):
                    encodings.encode(network, device)

    def _measured_part(self, name: str) -> list[tuple[tuple[int, ...], dict[str, np.ndarray]]] | None:
        """Return the losses [B, timesteps] of this process's batches, None if the run is to stop.

        Every process measures as many batches as every other, the last of them in vain where they do not go round:
        networks that are shared between processes are called by all of them.
        """
        accelerator, batches = self._learner.accelerator, self._set.batches
        num_rounds = -(-len(batches) // accelerator.num_processes)
        parts = []
        with tqdm(
            total=num_rounds * len(self._set.timesteps) * len(self._set.readings),
            desc="validation" if name == TRAINED else f"validation, {name}",
            leave=False,
            disable=not accelerator.is_local_main_process,
        ) as bar:
            for turn in range(num_rounds):
                position = turn * accelerator.num_processes + accelerator.process_index
                is_spare = position >= len(batches)
                micro_batch = batches[0 if is_spare else position]
                measured = self._losses_of(micro_batch, bar)
                if measured is None:
                    return None
                if not is_spare:
                    parts.append((micro_batch.indices, measured))
        return parts

    def _losses_of(self, micro_batch: MicroBatch, bar: "tqdm[None]") -> dict[str, np.ndarray] | None:
        """Return the losses [B, timesteps] of a batch by condition, None if the run is to stop."""
        device = self._learner.accelerator.device
        batch = self._set.batch(micro_batch).to(device)
        latents = self._latents_of(batch) * LATENT_SCALE
        sizes = size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        texts = self._texts_of(micro_batch.indices, device)
        found: dict[str, list[torch.Tensor]] = {condition: [] for condition in texts}
        for timestep in self._set.timesteps:
            if self._is_stopping():
                return None
            noise = torch.stack([self._noise(index, timestep, latents.shape[1:]) for index in micro_batch.indices])
            timesteps = torch.full((len(latents),), timestep, device=device)
            noisy = self._objective.noised(latents, to_device(noise, device).to(latents.dtype), timesteps)
            for condition, text in texts.items():
                predicted = self._learner.predict(noisy, text, sizes)
                found[condition].append(self._objective.plain_losses(predicted, latents, noisy, batch.masks))
                bar.update()
        return {
            condition: self._where_possible(condition, micro_batch.indices, torch.stack(losses, dim=1))
            for condition, losses in found.items()
        }

    def _texts_of(self, indices: Sequence[int], device: torch.device) -> dict[str, TextConditioning]:
        """Return what the U-Net is told of a batch; an image that cannot have a condition keeps its captions."""
        own, texts = self._set.readings[BOTH], {}
        for condition, readings in self._set.readings.items():
            read = [readings[index] or own[index] for index in indices]
            texts[condition] = conditioning(
                [each for each in read if each is not None], self._encoded_l, self._encoded_g, device
            )
        return texts

    def _where_possible(self, condition: str, indices: Sequence[int], losses: torch.Tensor) -> np.ndarray:
        of_batch: np.ndarray = losses.double().cpu().numpy()
        readings = self._set.readings[condition]
        of_batch[[readings[index] is None for index in indices]] = np.nan
        return of_batch

    def _noise(self, index: int, timestep: int, shape: Sequence[int]) -> torch.Tensor:
        image = self._set.images[index]
        return noise_of(image.subset.validation_seed, image.key, timestep, shape)


def noise_of(seed: int, key: str, timestep: int, shape: Sequence[int]) -> torch.Tensor:
    """Return the noise [C, h, w] of an image at a timestep, float32: a function of the arguments and nothing else."""
    message = f"{seed}\0{timestep}\0{key}".encode("utf-8", errors="surrogatepass")
    generator = torch.Generator().manual_seed(int.from_bytes(digest([message], 8), "little"))
    return torch.randn(tuple(shape), generator=generator)


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within the block the networks compute without what is there for training alone; after it as before."""
    were_training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, was_training in zip(networks, were_training, strict=True):
            network.train(was_training)
