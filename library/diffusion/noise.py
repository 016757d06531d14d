"""Noise in the latents, and the random draws of training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from library.diffusion.options import NoiseOptions
from library.sdxl.device_copies import to_device


class NoisyLatents(NamedTuple):
    """One training draw: `noise` and the noisy `latents` [B, C, h, w], `timesteps` [B]: int64, of a flow float32."""

    noise: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor


Generators = Sequence[torch.Generator]
"""One generator for each image of a batch, or a single one for all of them together."""


def draw_noise(latents: torch.Tensor, options: NoiseOptions, generators: Generators) -> torch.Tensor:
    """Return Gaussian noise shaped like `latents` [B, C, h, w], plus the offset and the multi-resolution noise.

    The order of draws from each generator is that of kohya's trainer: noise, the strength of the offset where it is
    random, offset, then for each lower resolution its size and its noise. Everything is drawn on the device of the
    generators: those of a CPU produce the same noise on every machine. (Kohya's trainer takes the sizes from Python's
    `random` instead.) Noise has the precision of the latents; an offset or a lower resolution makes it float32.
    """
    noise = _normal(tuple(latents.shape), generators, latents.device, latents.dtype)
    if options.noise_offset:
        offset = _strength(options.noise_offset, generators, latents, is_random=options.noise_offset_random_strength)
        noise = noise + _offset_strength(latents, offset, options) * _normal(
            (*latents.shape[:2], 1, 1), generators, latents.device
        )
    if options.multires_noise_iterations:
        parts = zip(noise.split(len(noise) // len(generators)), generators, strict=True)
        noise = torch.cat([_add_lower_resolutions(part, options, generator) for part, generator in parts])
    return noise


def perturbed(noise: torch.Tensor, options: NoiseOptions, generators: Generators) -> torch.Tensor:
    """Return the noise [B, C, h, w] that the U-Net sees where its input is perturbed: `noise` and a little more.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models"; drawn after the timesteps.
    """
    if not options.ip_noise_gamma:
        return noise
    is_random = options.ip_noise_gamma_random_strength
    strength = _strength(options.ip_noise_gamma, generators, noise, is_random=is_random)
    more = strength * _normal(tuple(noise.shape), generators, noise.device, noise.dtype)
    return noise + more.to(noise.dtype)


def _strength(most: float, generators: Generators, like: torch.Tensor, *, is_random: bool) -> torch.Tensor | float:
    """Return `most`, or where it is random the part of it that each generator draws, [B, 1, 1, 1]."""
    if not is_random:
        return most
    drawn = torch.tensor([most * _uniform(generator) for generator in generators])
    return to_device(drawn.repeat_interleave(len(like) // len(generators)), like.device)[:, None, None, None]


def _offset_strength(
    latents: torch.Tensor, offset: torch.Tensor | float, options: NoiseOptions
) -> torch.Tensor | float:
    """Return the strength of the offset noise: a number, or with an adaptive scale [B, C, 1, 1], at least 0."""
    if not options.adaptive_noise_scale:
        return offset
    channel_mean = latents.mean(dim=(2, 3), keepdim=True).abs()
    return (offset + options.adaptive_noise_scale * channel_mean).clamp(min=0)


def _add_lower_resolutions(noise: torch.Tensor, options: NoiseOptions, generator: torch.Generator) -> torch.Tensor:
    """Add noise of ever lower resolution to `noise` [B, C, h, w] and scale the sum of all B to unit variance.

    Source: J. Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training", as in kohya's trainer.
    """
    batch_size, channels, height, width = noise.shape
    for level in range(options.multires_noise_iterations or 0):
        shrink = (2 + 2 * _uniform(generator)) ** level
        coarse_height, coarse_width = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = _normal((batch_size, channels, coarse_height, coarse_width), [generator], noise.device)
        noise = noise + interpolate(coarse, (height, width), mode="bilinear") * options.multires_noise_discount**level
        if 1 in (coarse_height, coarse_width):
            break
    return noise / noise.std()


def _normal(
    shape: tuple[int, ...], generators: Generators, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return normal numbers [B, ...] from generators that draw equally many of the B each."""
    part = (shape[0] // len(generators), *shape[1:])
    drawn = [torch.randn(part, generator=each, device=each.device, dtype=dtype) for each in generators]
    return to_device(torch.cat(drawn), device)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, device=generator.device).item()
