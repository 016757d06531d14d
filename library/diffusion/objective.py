"""How far a prediction is from what was to be predicted."""

import torch


def per_sample_loss(predicted: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample, float32 [B], whatever precision the network ran in.

    `predicted` and `noise` are [B, C, h, w]. `mask` [B, 1, h, w], 0-1, weighs the latent cells; masked cells still
    count in the mean, so that a small subject weighs less than a large one (kohya's masked loss). Training takes the
    mean over samples: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 14.
    """
    error = (predicted.float() - noise.float()).square()
    if mask is not None:
        error = error * mask.float()
    return error.mean(dim=(1, 2, 3))
