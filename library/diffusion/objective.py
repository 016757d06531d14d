"""The training objective: what is drawn, what the U-Net has to predict, and the loss of a batch."""

import torch

from library.diffusion.forward_process import make_forward_process
from library.diffusion.noise import NoisyLatents, draw_noise, draw_timesteps
from library.diffusion.options import NoiseOptions
from library.sdxl.prediction import SDXL_PREDICTION, Prediction


class Objective:
    """What a step learns. The training loop, validation, the demo and the benchmarks compute their loss here."""

    def __init__(self, noise: NoiseOptions, prediction: Prediction = SDXL_PREDICTION):
        self._noise = noise
        self._process = make_forward_process(prediction)

    def draw(self, latents: torch.Tensor, generator: torch.Generator) -> NoisyLatents:
        """Draw noise, then timesteps, and add the noise to the scaled `latents` [B, C, h, w]."""
        noise = draw_noise(latents, self._noise, generator)
        timesteps = draw_timesteps(latents.shape[0], self._noise, generator, latents.device)
        return self.noised(latents, noise, timesteps)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> NoisyLatents:
        """Return the latents with this noise [B, C, h, w], at timesteps [B] of 0 to 999 (of a flow: to 1000)."""
        return NoisyLatents(noise, timesteps, self._process.noised(latents, noise, timesteps))

    def target(self, latents: torch.Tensor, noisy: NoisyLatents) -> torch.Tensor:
        """Return what the U-Net has to predict, [B, C, h, w]."""
        return self._process.target(latents, noisy.noise, noisy.timesteps)

    def losses(
        self,
        predicted: torch.Tensor,
        latents: torch.Tensor,
        noisy: NoisyLatents,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each sample, float32 [B]; `mask` as in `per_sample_loss`."""
        return per_sample_loss(predicted, self.target(latents, noisy), mask)

    def plain_losses(self, predicted: torch.Tensor, latents: torch.Tensor, noisy: NoisyLatents) -> torch.Tensor:
        """Return the mean squared error of each sample, float32 [B], whatever the options do to the trained loss."""
        return per_sample_loss(predicted, self.target(latents, noisy))


def per_sample_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error of each sample, float32 [B], whatever precision the network runs in.

    `predicted` and `target` are [B, C, h, w]. `mask` [B, 1, h, w], 0-1, weights the latent cells; masked cells still
    count in the mean, so a small subject weighs less than a large one (kohya's masked loss). Training takes the mean
    over samples: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 14.
    """
    error = (predicted.float() - target.float()).square()
    if mask is not None:
        error = error * mask.float()
    return error.mean(dim=(1, 2, 3))
