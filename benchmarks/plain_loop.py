"""The training loop of the examples of diffusers, against which the trainer is measured.

Weights in bfloat16, gradient checkpointing, transformers' Adafactor with the arguments of the recipe in README, latents
from the cache. Both captions are encoded in every step, as the trainer does without a text cache.
"""

from collections.abc import Iterable

import torch
from transformers.optimization import Adafactor

from benchmarks.step_clock import StepClock
from library.data.dataset import Batch
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import TextConditioning, encode_captions

_RATE = 1e-5
_NOISE_OFFSET = 0.0357


def train_plainly(model: SdxlModel, batches: Iterable[Batch], device: torch.device, clock: StepClock) -> None:
    """Train for the steps that `clock` counts; it times the forward passes by hooks."""
    for network in (model.text_encoder_l, model.text_encoder_g, model.vae):
        network.requires_grad_(False)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    optimizer = Adafactor(
        model.unet.parameters(),
        lr=_RATE,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        weight_decay=0.01,
    )
    objective, generator = Objective(NoiseOptions(noise_offset=_NOISE_OFFSET)), torch.Generator()
    for _, batch in zip(range(clock.num_steps), batches, strict=False):
        with torch.no_grad():
            text = encode_captions(model.text_encoder_l, model.text_encoder_g, batch.tokens.to(device))
        loss = _loss(model, batch, text, objective, generator, device)
        with clock.stretch("backward"):
            loss.backward()
        with clock.stretch("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.detach().item()  # such a loop logs it in every step
        clock.end_step()


def _loss(
    model: SdxlModel,
    batch: Batch,
    text: TextConditioning,
    objective: Objective,
    generator: torch.Generator,
    device: torch.device,
) -> torch.Tensor:
    assert batch.latents is not None
    latents = batch.latents.to(device, model.unet.dtype) * LATENT_SCALE
    noisy = objective.draw(latents, [generator])
    predicted = model.unet(
        noisy.latents.to(model.unet.dtype),
        noisy.timesteps,
        encoder_hidden_states=text.hidden,
        added_cond_kwargs={
            "text_embeds": text.pooled,
            "time_ids": size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes).to(device),
        },
    ).sample
    return objective.losses(predicted, latents, noisy).mean()
