"""A training step of SDXL written out with diffusers, transformers, OpenCLIP's tokenizer and torch alone."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch.nn.functional import mse_loss

from library.captions.draws import CaptionDraw, noise_seed
from library.data.epoch_order import BatchShape, EpochOrder
from library.sdxl.weight_names import unet_table
from tests.conftest import PreparedSet
from tests.correctness.conftest import SHAPES

END_TOKEN = 49407


@dataclass(frozen=True)
class PlainNoise:
    """What the flags say about noise."""

    offset: float = 0.0
    adaptive_scale: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000

    def drawn_for(self, latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and timestep of one image."""
        noise = torch.randn(latents.shape, generator=generator)
        if self.offset:
            strength = self.offset + self.adaptive_scale * latents.mean(dim=(2, 3), keepdim=True).abs()
            noise = noise + strength * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        timestep = torch.randint(self.min_timestep, self.max_timestep, (len(latents),), generator=generator)
        return noise, timestep


def batches_of_steps(prepared: PreparedSet, shape: BatchShape, seed: int) -> list[list[list[str]]]:
    """The keys in each batch of each step of the first epoch of one process."""
    entries = json.loads(prepared.latents_json.read_text(encoding="utf-8"))
    keys, kinds = list(entries), [tuple(entry["train_resolution"]) for entry in entries.values()]
    steps: list[list[list[str]]] = [[]]
    for batch in EpochOrder(kinds, shape, seed=seed):
        steps[-1].append([keys[index] for index in batch.indices])
        if batch.completes_step:
            steps.append([])
    return steps[:-1]


class PlainTraining:
    """A copy of a model that diffusers has read, to be trained on pictures of a prepared set.

    `velocity` is the target of v-prediction, with zero terminal SNR. `computes_in` bfloat16 is what
    --mixed_precision=bf16 means; `trained` names the networks that learn, in the precision `held_in`. The others are
    held in that of the computation.
    """

    def __init__(
        self,
        model: StableDiffusionXLPipeline,
        prepared: PreparedSet,
        noise: PlainNoise,
        *,
        trained: Sequence[str] = ("unet",),
        held_in: torch.dtype = torch.float32,
        computes_in: torch.dtype = torch.float32,
        velocity: bool = False,
        min_snr_gamma: float = 0.0,
    ):
        networks = {"unet": model.unet, "text_encoder_l": model.text_encoder, "text_encoder_g": model.text_encoder_2}
        self._networks = {
            # torch's own `to`: that of diffusers warns at every change of precision
            name: nn.Module.to(copy.deepcopy(network), held_in if name in trained else computes_in)
            for name, network in networks.items()
        }
        self.trained = {name: self._networks[name].requires_grad_(True) for name in trained}
        for name in self._networks.keys() - self.trained.keys():
            self._networks[name].requires_grad_(False)
        self._model = model
        self._prepared = prepared
        self._noise = noise
        self._precision = torch.autocast("cpu", computes_in, enabled=computes_in != torch.float32)
        self._entries = json.loads(prepared.latents_json.read_text(encoding="utf-8"))
        self._velocity, self._gamma = velocity, min_snr_gamma
        self._schedule = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=velocity
        )
        self._tokenizer = SimpleTokenizer()

    def backward(self, batches: Sequence[Sequence[str]], seed: int) -> float:
        """Add up the gradients of a step in the first epoch of a run with this seed; its loss, the mean over images."""
        num_pictures = sum(len(keys) for keys in batches)
        step_loss = torch.zeros(())
        for keys in batches:
            loss = self._losses(keys, seed).sum() / num_pictures
            loss.backward()
            step_loss += loss.detach()
        return step_loss.item()

    def unet_weights(self) -> dict[str, torch.Tensor]:
        """The U-Net's weights by their names in a single file."""
        parameters = dict(self._networks["unet"].named_parameters())
        return {
            stored.name: stored.from_parameters([parameters[name].detach() for name in stored.parameters])
            for stored in unet_table(self._networks["unet"])
        }

    def _losses(self, keys: Sequence[str], seed: int) -> torch.Tensor:
        """The loss of each picture of a batch of one bucket."""
        latents = torch.stack([self._latents(key) for key in keys]) * 0.13025
        seeds = [noise_seed(CaptionDraw(seed, epoch=1, key=key)) for key in keys]
        drawn = [
            self._noise.drawn_for(image[None], torch.Generator().manual_seed(own))
            for image, own in zip(latents, seeds, strict=True)
        ]
        noise, timesteps = (torch.cat(each) for each in zip(*drawn, strict=True))
        hidden, pooled = self._text(keys)
        with self._precision:
            predicted = self._networks["unet"](
                self._schedule.add_noise(latents, noise, timesteps),
                timesteps,
                encoder_hidden_states=hidden,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.cat([self._sizes(key) for key in keys])},
            ).sample
        target = self._schedule.get_velocity(latents, noise, timesteps) if self._velocity else noise
        losses = mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
        if not self._gamma:
            return losses
        kept = self._schedule.alphas_cumprod[timesteps]
        snr = kept / (1 - kept)
        return losses * (torch.minimum(snr, torch.full_like(snr, self._gamma)) / (snr + 1))

    def _latents(self, key: str) -> torch.Tensor:
        with np.load(self._prepared.images / f"{key}.npz") as file:
            return torch.from_numpy(file["latents"])

    def _text(self, keys: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `StableDiffusionXLPipeline.encode_prompt` with the L caption as prompt and the G caption as prompt_2."""
        ids_l = self._tokenizer([self._entries[key]["captionL"] for key in keys])
        ids_l = torch.where((ids_l == END_TOKEN).cumsum(dim=1) > 0, END_TOKEN, ids_l)  # L's padding is the end token
        ids_g = self._tokenizer([self._entries[key]["captionG"] for key in keys])
        output_l = self._networks["text_encoder_l"](ids_l, output_hidden_states=True)
        output_g = self._networks["text_encoder_g"](ids_g, output_hidden_states=True)
        hidden = torch.cat([output_l.hidden_states[-2], output_g.hidden_states[-2]], dim=-1)
        return hidden, output_g.text_embeds

    def _sizes(self, key: str) -> torch.Tensor:
        shape = SHAPES[key.split()[-1]]
        return self._model._get_add_time_ids(
            original_size=shape.size[::-1],
            crops_coords_top_left=shape.crop[::-1],
            target_size=shape.bucket[::-1],
            dtype=torch.float32,
            text_encoder_projection_dim=self._model.text_encoder_2.config.projection_dim,
        )
