"""How the error of each latent value counts: squared, absolute, or in between."""

import math
from collections.abc import Callable

import torch

from library.diffusion.forward_process import ForwardProcess
from library.diffusion.loss_options import CONSTANT, EXPONENTIAL, HUBER, L1, L2, LossOptions
from library.diffusion.options import NUM_TIMESTEPS

PixelLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From errors [B, C, h, w] in float32 and timesteps [B] to losses [B, C, h, w]."""


def make_pixel_loss(options: LossOptions, process: ForwardProcess) -> PixelLoss:
    """Return the loss that the options name."""
    if options.loss_type == L2:
        return squared
    if options.loss_type == L1:
        return lambda errors, timesteps: errors.abs()

    def huber(errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        delta = huber_thresholds(timesteps, options, process)[:, None, None, None]
        losses = pseudo_huber(errors, delta)
        return losses * delta if options.loss_type == HUBER else losses

    return huber


def squared(errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the squared errors."""
    return errors.square()


def pseudo_huber(errors: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return 2 (sqrt(x^2 + delta^2) - delta): x^2 / delta where x is small, 2 |x| where it is large.

    It is kohya's smooth_l1; times delta his huber, which is x^2 where x is small (Song and Dhariwal 2023, equation 7).
    Written so that no digits cancel.
    """
    squares = errors.square()
    return 2 * squares / ((squares + delta.square()).sqrt() + delta)


def huber_thresholds(timesteps: torch.Tensor, options: LossOptions, process: ForwardProcess) -> torch.Tensor:
    """Return delta [B] in float32: from 1 at the first timestep to `huber_c` at the last, or constant.

    snr: (1 - c) / (1 + noise / signal)^2 + c; of a flow, noise / signal is s / (1 - s).
    """
    if options.huber_schedule == CONSTANT:
        return torch.full(timesteps.shape, options.huber_c * options.huber_scale, device=timesteps.device)
    if options.huber_schedule == EXPONENTIAL:
        return torch.exp(math.log(options.huber_c) / NUM_TIMESTEPS * timesteps.float()) * options.huber_scale
    noise_to_signal = process.snr(timesteps).rsqrt()
    return (1 - options.huber_c) / (1 + noise_to_signal).square() + options.huber_c
