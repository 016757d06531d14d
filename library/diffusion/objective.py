"""The training objective: what is drawn, what the U-Net has to predict, and the loss of a batch."""

import torch

from library.diffusion.forward_process import make_forward_process
from library.diffusion.learnt_weights import LearntWeights
from library.diffusion.loss_options import LossOptions
from library.diffusion.loss_weights import make_loss_weights
from library.diffusion.noise import Generators, NoisyLatents, draw_noise, perturbed
from library.diffusion.options import NoiseOptions, TimestepOptions
from library.diffusion.pixel_losses import PixelLoss, make_pixel_loss, squared
from library.diffusion.timesteps import draw_timesteps
from library.sdxl.prediction import FLOW, SDXL_PREDICTION, Prediction

_USUAL_NOISE, _USUAL_TIMESTEPS, _USUAL_LOSS = NoiseOptions(), TimestepOptions(), LossOptions()


class Objective:
    """What a step learns. The training loop, validation, the demo and the benchmarks compute their loss here."""

    def __init__(
        self,
        noise: NoiseOptions = _USUAL_NOISE,
        prediction: Prediction = SDXL_PREDICTION,
        *,
        timesteps: TimestepOptions = _USUAL_TIMESTEPS,
        loss: LossOptions = _USUAL_LOSS,
        learnt: LearntWeights | None = None,
    ):
        self._noise = noise
        self._timesteps = timesteps
        self._is_continuous = prediction.kind == FLOW
        self._process = make_forward_process(prediction)
        self._pixel_loss = make_pixel_loss(loss, self._process)
        self._learnt = learnt
        self._weights = make_loss_weights(loss, prediction.kind, self._process)

    def draw(
        self, latents: torch.Tensor, generators: Generators, strata: tuple[int, int, int] | None = None
    ) -> NoisyLatents:
        """Draw noise, then timesteps, and add the noise to the scaled `latents` [B, C, h, w]; `strata` as there.

        With a generator for each image, what is drawn for it does not depend on the others of its batch.
        """
        noise = draw_noise(latents, self._noise, generators)
        timesteps = draw_timesteps(
            latents.shape[0],
            self._timesteps,
            generators,
            latents.device,
            continuous=self._is_continuous,
            strata=strata,
        )
        seen = self.noised(latents, perturbed(noise, self._noise, generators), timesteps)
        return seen._replace(noise=noise)

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
        target = self.target(latents, noisy)
        losses = per_sample_loss(predicted, target, mask, pixel_loss=self._pixel_loss, timesteps=noisy.timesteps)
        if self._weights is not None:
            losses = losses * self._weights(noisy.timesteps)
        return losses if self._learnt is None else self._learnt.weighed(losses, noisy.timesteps)

    def plain_losses(
        self,
        predicted: torch.Tensor,
        latents: torch.Tensor,
        noisy: NoisyLatents,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean squared error of each sample, float32 [B], whatever the options do to the trained loss."""
        return per_sample_loss(predicted, self.target(latents, noisy), mask)


_NO_TIMESTEPS = torch.empty(0)


def per_sample_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    pixel_loss: PixelLoss = squared,
    timesteps: torch.Tensor = _NO_TIMESTEPS,
) -> torch.Tensor:
    """Return the mean loss of each sample, float32 [B], whatever precision the network runs in.

    `predicted` and `target` are [B, C, h, w]. `mask` [B, 1, h, w], 0-1, weights the latent cells; masked cells still
    count in the mean, so a small subject weighs less than a large one (kohya's masked loss). Training takes the mean
    over samples: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 14.
    """
    losses = pixel_loss(predicted.float() - target.float(), timesteps)
    if mask is not None:
        losses = losses * mask.float()
    return losses.mean(dim=(1, 2, 3))
