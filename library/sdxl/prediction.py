"""What the U-Net predicts, over which noise schedule: one record that training, sampling and saving read."""

from dataclasses import dataclass
from typing import Any

EPSILON = "epsilon"
VELOCITY = "v_prediction"
FLOW = "flow_prediction"
"""The kinds that can be trained, in the words of diffusers' `prediction_type`."""

VELOCITY_MARKER = "v_pred"
ZERO_TERMINAL_SNR_MARKER = "ztsnr"
"""Tensors of a single file from which ComfyUI and WebUIs know the kind of model; they hold no numbers."""

PREDICTION_KEY = "modelspec.prediction_type"
FLOW_SHIFT_KEY = "flow_shift"
"""Keys in the header of a single file."""


@dataclass(frozen=True)
class Prediction:
    """The prediction type and the betas of a diffusion model, in the terms of diffusers' schedulers.

    `kind` is diffusers' `prediction_type`:
        epsilon: the noise n (Ho et al. 2020).
        v_prediction: the velocity sqrt(a) n - sqrt(1 - a) x, where a is the cumulative alpha (Salimans and Ho 2022).
        flow_prediction: n - x, where the noisy latents are (1 - s) x + s n at timestep 1000 s (Liu et al. 2022).

    Under `scaled_linear` the square roots of the betas are linear from `beta_start` to `beta_end` over `num_timesteps`
    (Rombach et al. 2022). With `has_zero_terminal_snr` they are rescaled until nothing is left of the image at the last
    timestep (Lin et al. 2023, algorithm 1). A flow has no betas; images are drawn with `flow_shift` (Esser et al. 2024,
    section 5.3.2).
    """

    kind: str = EPSILON
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    has_zero_terminal_snr: bool = False
    flow_shift: float = 1.0

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments of a diffusers scheduler for this model, before zero terminal SNR rescales its betas."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.kind,
        }

    def markers(self) -> list[str]:
        """Return the names of the marker tensors in a single file of this model."""
        velocity = [VELOCITY_MARKER] if self.kind == VELOCITY else []
        return velocity + ([ZERO_TERMINAL_SNR_MARKER] if self.has_zero_terminal_snr else [])

    def header(self) -> dict[str, str]:
        """Return what the header of a single file says of this."""
        said = {PREDICTION_KEY: _IN_HEADER[self.kind]}
        return said if self.flow_shift == 1 else {**said, FLOW_SHIFT_KEY: repr(self.flow_shift)}

    def __str__(self) -> str:
        shift = f", drawn with a shift of {self.flow_shift:g}" if self.flow_shift != 1 else ""
        return _IN_WORDS[self.kind] + (" with zero terminal SNR" if self.has_zero_terminal_snr else "") + shift


SDXL_PREDICTION = Prediction()
"""SDXL base: the noise (epsilon) over 1000 timesteps."""

_IN_HEADER = {EPSILON: "epsilon", VELOCITY: "v", FLOW: "flow"}
_IN_WORDS = {EPSILON: "noise (epsilon)", VELOCITY: "velocity (v)", FLOW: "a rectified flow"}
