"""What the U-Net predicts, over which noise schedule: one record that training, sampling and saving read."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """The prediction type and the betas of a diffusion model, in the terms of diffusers' schedulers.

    `kind` is diffusers' `prediction_type`. Under `scaled_linear` the square roots of the betas are linear from
    `beta_start` to `beta_end` over `num_timesteps` (Rombach et al. 2022).
    """

    kind: str = "epsilon"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments of a diffusers scheduler for this model."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.kind,
        }


SDXL_PREDICTION = Prediction()
"""SDXL base: the noise (epsilon) over 1000 timesteps."""
