"""The flags of the loss: how errors are measured, and how much each timestep counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.config.options import changed_options, option
from library.sdxl.prediction import EPSILON, FLOW, VELOCITY

L2, L1, HUBER, SMOOTH_L1 = "l2", "l1", "huber", "smooth_l1"
SNR, EXPONENTIAL, CONSTANT = "snr", "exponential", "constant"
EDM2 = "edm2"
_OF_HUBER = ("huber_schedule", "huber_c", "huber_scale")
_OF_EDM2 = ("edm2_learning_rate", "edm2_channels")
_MOST_GAMMA = 1e6


@dataclass(frozen=True)
class LossOptions:
    """How the error of a prediction becomes the loss."""

    _argument_group_name: ClassVar[str] = "Loss"

    loss_type: str = option(
        L2,
        "How the error of each latent value counts: squared (l2), absolute (l1), or squared where it is small and "
        "absolute where it is large (huber, smooth_l1).",
        choices=(L2, L1, HUBER, SMOOTH_L1),
    )
    huber_schedule: str = option(
        SNR,
        "Where errors begin to count as large for --loss_type huber and smooth_l1: from 1 at the first timestep to "
        "--huber_c at the last, by the signal-to-noise ratio (snr) or exponentially, or always --huber_c (constant).",
        choices=(SNR, EXPONENTIAL, CONSTANT),
    )
    huber_c: float = option(0.1, "Threshold of --loss_type huber and smooth_l1.", least=1e-6, most=1000)
    huber_scale: float = option(
        1.0, "Multiply the thresholds of --huber_schedule exponential and constant.", least=1e-6, most=1000
    )
    min_snr_gamma: float | None = option(
        None,
        "Weigh timesteps by min(SNR, gamma) / SNR, for velocity min(SNR, gamma) / (SNR + 1): less for weak noise (Hang "
        "et al. 2023); 5 is common. 0 disables it.",
        least=0,
        most=_MOST_GAMMA,
    )
    debiased_estimation_loss: bool = option(
        False,
        "Weigh timesteps by 1 / sqrt(SNR), for velocity 1 / (SNR + 1): more for strong noise (Yu et al. 2023).",
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "Weigh timesteps of a model that predicts velocity by SNR / (SNR + 1), as if it predicted noise."
    )
    v_pred_like_loss: float | None = option(
        None,
        "Add this multiple of the loss that a model that predicts velocity would have, to one that predicts noise. 0 "
        "disables it.",
        least=0,
        most=_MOST_GAMMA,
    )
    loss_weighting: str = option(
        CONSTANT,
        "edm2: learn the weight of each noise level, so that all levels count alike (Karras et al. 2024): a small "
        "network learns how large the loss is at each, and the loss is divided by it.",
        choices=(CONSTANT, EDM2),
    )
    edm2_learning_rate: float = option(
        0.005, "Learning rate of the network of --loss_weighting edm2.", least=1e-8, most=1
    )
    edm2_channels: int = option(128, "Size of the network of --loss_weighting edm2.", least=1, most=4096)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.loss_type not in (HUBER, SMOOTH_L1):
            for flag in changed_options(self, _OF_HUBER):
                yield f"--{flag} has no effect on --loss_type {self.loss_type}; it belongs to huber and smooth_l1."
        elif self.huber_schedule == SNR and changed_options(self, ["huber_scale"]):
            yield "--huber_scale has no effect on --huber_schedule snr; it belongs to exponential and constant."
        if self.loss_weighting != EDM2:
            for flag in changed_options(self, _OF_EDM2):
                yield f"--{flag} has no effect without --loss_weighting edm2; add it."
        elif weights := self._weights():
            yield (
                "--loss_weighting edm2 divides every noise level by what its loss is, which undoes "
                f"{' and '.join(weights)}; keep one of them."
            )

    def misfits(self, kind: str) -> Iterator[str]:
        """Yield the weights that do not fit models of this prediction type, one sentence each."""
        if kind == FLOW:
            for flag in self._weights():
                yield (
                    f"{flag} weighs by the signal-to-noise ratio of diffusion models, and this is a flow; remove it, "
                    "or choose which timesteps are trained most with --timestep_sampling."
                )
            return
        if self.scale_v_pred_loss_like_noise_pred and kind != VELOCITY:
            yield "--scale_v_pred_loss_like_noise_pred is for models that predict velocity, and this one does not."
        if self.v_pred_like_loss and kind != EPSILON:
            yield "--v_pred_like_loss is for models that predict noise, and this one does not."

    def _weights(self) -> list[str]:
        """Return the flags that weigh timesteps by their signal-to-noise ratio."""
        names = ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")
        return [f"--{name}" for name in names if getattr(self, name)]
