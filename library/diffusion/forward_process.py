"""How noise is added to latents, and what the U-Net has to predict: for each prediction type."""

from typing import Protocol

import torch
from diffusers import DDPMScheduler

from library.sdxl.device_copies import to_device
from library.sdxl.noise_schedule import make_noise_schedule
from library.sdxl.prediction import FLOW, VELOCITY, Prediction


class ForwardProcess(Protocol):
    """Noisy latents and targets; all tensors are [B, C, h, w], `timesteps` [B]."""

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the latents with the noise of their timesteps."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the U-Net has to predict."""

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio (of variances) at the timesteps, float32 [B]; 0 where nothing is left."""


def make_forward_process(prediction: Prediction) -> ForwardProcess:
    """Return the process of models that predict this."""
    if prediction.kind == FLOW:
        return _Flow(prediction.num_timesteps)
    return _Diffusion(make_noise_schedule(prediction), predicts_velocity=prediction.kind == VELOCITY)


class _Diffusion:
    """Variance-preserving diffusion: sqrt(a) x + sqrt(1 - a) n, where a is the cumulative alpha of the timestep."""

    def __init__(self, schedule: DDPMScheduler, *, predicts_velocity: bool):
        self._schedule = schedule
        self._predicts_velocity = predicts_velocity
        self._snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self._schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self._predicts_velocity:
            return self._schedule.get_velocity(latents, noise, timesteps)
        return noise

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self._snr.device != timesteps.device:
            self._snr = to_device(self._snr, timesteps.device)
        return self._snr[timesteps]


class _Flow:
    """Rectified flow: (1 - s) x + s n at timestep s * `num_timesteps`, which need not be whole; the target is n - x."""

    def __init__(self, num_timesteps: int):
        self._num_timesteps = num_timesteps

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        s = self._noise_fraction(timesteps).to(latents.dtype)[:, None, None, None]
        return s * noise + (1 - s) * latents

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        s = self._noise_fraction(timesteps)
        return ((1 - s) / s).square()

    def _noise_fraction(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float() / self._num_timesteps
