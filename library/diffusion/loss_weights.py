"""How much each timestep counts in the loss, by its signal-to-noise ratio (SNR)."""

from collections.abc import Callable

import torch

from library.diffusion.forward_process import ForwardProcess
from library.diffusion.loss_options import LossOptions
from library.sdxl.prediction import VELOCITY

LARGEST_SNR = 1000.0
"""Where the reference cuts off what it divides by: SDXL's first timestep has 1175."""

Weights = Callable[[torch.Tensor], torch.Tensor]
"""From timesteps [B] to weights [B] in float32."""


def make_loss_weights(options: LossOptions, kind: str, process: ForwardProcess) -> Weights | None:
    """Return the product of the weights that the options ask for; None if there are none.

    Where nothing is left of the image (SNR 0, the last timestep of zero terminal SNR), weights that would be infinite
    are those of the timestep before it.
    """
    predicts_velocity = kind == VELOCITY
    factors: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if gamma := options.min_snr_gamma:
        factors.append(lambda snr: min_snr_weights(snr, gamma, predicts_velocity=predicts_velocity))
    if options.scale_v_pred_loss_like_noise_pred:
        factors.append(noise_like_weights)
    if share := options.v_pred_like_loss:
        factors.append(lambda snr: 1 + share / noise_like_weights(snr))
    if options.debiased_estimation_loss:
        factors.append(lambda snr: debiased_weights(snr, predicts_velocity=predicts_velocity))
    if not factors:
        return None
    divides_by_snr = bool(options.v_pred_like_loss) or (options.debiased_estimation_loss and not predicts_velocity)

    def weights(timesteps: torch.Tensor) -> torch.Tensor:
        snr = process.snr(timesteps)
        if divides_by_snr:
            snr = torch.where(snr > 0, snr, process.snr(timesteps - 1))
        return torch.stack([factor(snr) for factor in factors]).prod(dim=0)

    return weights


def min_snr_weights(snr: torch.Tensor, gamma: float, *, predicts_velocity: bool) -> torch.Tensor:
    """Return min(SNR, gamma) / SNR, for velocity min(SNR, gamma) / (SNR + 1).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4. Without noise the
    first is 0; without signal it is 1.
    """
    if predicts_velocity:
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def noise_like_weights(snr: torch.Tensor) -> torch.Tensor:
    """Return SNR / (SNR + 1): the error of the noise that a velocity implies, in multiples of that of the velocity."""
    snr = snr.clamp(max=LARGEST_SNR)
    return snr / (snr + 1)


def debiased_weights(snr: torch.Tensor, *, predicts_velocity: bool) -> torch.Tensor:
    """Return 1 / sqrt(SNR) (Yu et al. 2023, "Debias the Training of Diffusion Models"), for velocity 1 / (SNR + 1)."""
    snr = snr.clamp(max=LARGEST_SNR)
    return 1 / (snr + 1) if predicts_velocity else snr.rsqrt()
