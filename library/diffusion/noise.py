"""How noise enters the latents: its schedule over 1000 timesteps and the draws that training makes from it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch.nn.functional import interpolate

from library.config.options import option
from library.sdxl.device_copies import to_device

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseOptions:
    """Which noise is added to the latents, and at which timesteps."""

    _argument_group_name: ClassVar[str] = "Noise"

    noise_offset: float | None = option(
        None,
        "Strength of noise that is constant over a channel; lets training change the brightness of whole pictures.",
    )
    adaptive_noise_scale: float | None = option(
        None, "Adds this times the absolute channel mean of the latents to --noise_offset; may be negative."
    )
    multires_noise_iterations: int | None = option(
        None, "Number of coarser resolutions at which noise is added, 6 to 10."
    )
    multires_noise_discount: float = option(
        0.3, "Strength of each coarser noise relative to the one before it, 0 to 1."
    )
    min_timestep: int | None = option(None, "First timestep that is trained (0 where not given).")
    max_timestep: int | None = option(
        None, f"End of the trained timesteps, itself not trained ({NUM_TIMESTEPS} where not given)."
    )

    @property
    def timestep_range(self) -> range:
        """The timesteps that are trained."""
        return range(self.min_timestep or 0, NUM_TIMESTEPS if self.max_timestep is None else self.max_timestep)

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, one sentence each."""
        if self.noise_offset is not None and not 0 <= self.noise_offset < math.inf:
            yield f"--noise_offset is {self.noise_offset}; it must be 0 or more (0.0357 is usual)."
        if self.adaptive_noise_scale is not None and not math.isfinite(self.adaptive_noise_scale):
            yield f"--adaptive_noise_scale is {self.adaptive_noise_scale}; it must be finite (0.00357 is usual)."
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            yield "--adaptive_noise_scale changes --noise_offset, which is not set; set it too."
        if self.multires_noise_iterations is not None and self.multires_noise_iterations < 0:
            yield f"--multires_noise_iterations is {self.multires_noise_iterations}; it must be 0 or more."
        if not 0 <= self.multires_noise_discount <= 1:
            yield f"--multires_noise_discount is {self.multires_noise_discount}; it must be between 0 and 1."
        trained = self.timestep_range
        if not 0 <= trained.start < trained.stop <= NUM_TIMESTEPS:
            yield (
                f"--min_timestep {trained.start} and --max_timestep {trained.stop} leave nothing to train; "
                f"they must satisfy 0 <= min < max <= {NUM_TIMESTEPS}."
            )


class NoisyBatch(NamedTuple):
    """One training draw: `noise` and `noisy_latents` [B, C, h, w], `timesteps` int64 [B]."""

    noise: torch.Tensor
    timesteps: torch.Tensor
    noisy_latents: torch.Tensor


def make_noise_schedule() -> DDPMScheduler:
    """SDXL's noise schedule: square roots of beta linear from 0.00085 to 0.012 over 1000 steps."""
    return DDPMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
    )


def draw_training_noise(
    latents: torch.Tensor,
    schedule: DDPMScheduler,
    options: NoiseOptions,
    generator: torch.Generator,
    uniform: Callable[[], float] | None = None,
) -> NoisyBatch:
    """Noise, timesteps and noisy latents for scaled `latents` [B, C, h, w], drawn in the order of kohya's trainer.

    The order is noise, offset noise, multi-resolution noise, timesteps. `uniform` as in `draw_noise`.
    Noise is in the latents' precision; an offset or coarser noise makes it, and the noisy latents, float32.
    """
    noise = draw_noise(latents, options, generator, uniform)
    timesteps = draw_timesteps(latents.shape[0], options, generator, latents.device)
    return NoisyBatch(noise, timesteps, schedule.add_noise(latents, noise, timesteps))


def draw_noise(
    latents: torch.Tensor,
    options: NoiseOptions,
    generator: torch.Generator,
    uniform: Callable[[], float] | None = None,
) -> torch.Tensor:
    """Gaussian noise shaped as `latents` [B, C, h, w], with the offset and the coarser noise that `options` ask for.

    All of it comes from `generator` (drawn on its device, so that a CPU generator gives the same noise on every
    machine): who stores its state can resume the run exactly. The sizes of the coarser noise need plain numbers in
    [0, 1); `uniform` gives them, by default out of `generator` too. Kohya's trainer takes them from Python's
    `random.random`: `random.Random(seed).random` gives its very noise.
    """
    noise = _normal(tuple(latents.shape), generator, latents.device, latents.dtype)
    if options.noise_offset:
        noise = noise + _offset_strength(latents, options) * _normal(
            (*latents.shape[:2], 1, 1), generator, latents.device
        )
    if options.multires_noise_iterations:
        noise = _add_coarser_noise(noise, options, generator, uniform or (lambda: _uniform(generator)))
    return noise


def draw_timesteps(
    batch_size: int, options: NoiseOptions, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """Timesteps int64 [B] on `device`, uniform from `min_timestep` to `max_timestep` (exclusive)."""
    trained = options.timestep_range
    drawn = torch.randint(trained.start, trained.stop, (batch_size,), generator=generator, device=generator.device)
    return to_device(drawn, device)


def _offset_strength(latents: torch.Tensor, options: NoiseOptions) -> torch.Tensor | float:
    """Strength of the offset noise: one number, or with an adaptive scale [B, C, 1, 1], never below 0."""
    assert options.noise_offset is not None
    if not options.adaptive_noise_scale:
        return options.noise_offset
    channel_mean = latents.mean(dim=(2, 3), keepdim=True).abs()
    return (options.noise_offset + options.adaptive_noise_scale * channel_mean).clamp(min=0)


def _add_coarser_noise(
    noise: torch.Tensor, options: NoiseOptions, generator: torch.Generator, uniform: Callable[[], float]
) -> torch.Tensor:
    """`noise` [B, C, h, w] plus noise of ever lower resolution (from the full one down), scaled to unit variance.

    Source: J. Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training", as in kohya's trainer.
    """
    batch_size, channels, height, width = noise.shape
    for level in range(options.multires_noise_iterations or 0):
        shrink = (2 + 2 * uniform()) ** level
        coarse_height, coarse_width = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = _normal((batch_size, channels, coarse_height, coarse_width), generator, noise.device)
        noise = noise + interpolate(coarse, (height, width), mode="bilinear") * options.multires_noise_discount**level
        if 1 in (coarse_height, coarse_width):
            break
    return noise / noise.std()


def _normal(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return to_device(torch.randn(shape, generator=generator, device=generator.device, dtype=dtype), device)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, device=generator.device).item()
