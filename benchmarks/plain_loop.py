"""The training loop as the examples of diffusers have it: what ours is measured against.

Weights in bfloat16, gradient checkpointing, transformers' Adafactor with the arguments of the recipe in README, latents
from the cache; both captions are encoded in every step, as ours does without a text cache.
"""

from collections.abc import Iterable

import torch
from diffusers import DDPMScheduler
from torch.nn.functional import mse_loss
from transformers.optimization import Adafactor

from benchmarks.step_clock import StepClock
from library.data.dataset import Batch
from library.diffusion.noise import make_noise_schedule
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import TextConditioning, encode_captions

_RATE = 1e-5
_NOISE_OFFSET = 0.0357


def train_plainly(model: SdxlModel, batches: Iterable[Batch], device: torch.device, clock: StepClock) -> None:
    """As many steps as the clock wants, which times the forward passes by itself."""
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
    schedule = make_noise_schedule()
    for _, batch in zip(range(clock.num_steps), batches, strict=False):
        with torch.no_grad():
            text = encode_captions(model.text_encoder_l, model.text_encoder_g, batch.tokens.to(device))
        loss = _loss(model, batch, text, schedule, device)
        with clock.stretch("backward"):
            loss.backward()
        with clock.stretch("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.detach().item()  # which such a loop logs in every step
        clock.end_step()


def _loss(
    model: SdxlModel, batch: Batch, text: TextConditioning, schedule: DDPMScheduler, device: torch.device
) -> torch.Tensor:
    assert batch.latents is not None
    latents = batch.latents.to(device, model.unet.dtype) * LATENT_SCALE
    noise = torch.randn_like(latents)
    noise += _NOISE_OFFSET * torch.randn(*latents.shape[:2], 1, 1, device=device)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=device)
    predicted = model.unet(
        schedule.add_noise(latents, noise, timesteps),
        timesteps,
        encoder_hidden_states=text.hidden,
        added_cond_kwargs={
            "text_embeds": text.pooled,
            "time_ids": size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes).to(device),
        },
    ).sample
    return mse_loss(predicted.float(), noise.float())
