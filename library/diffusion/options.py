"""The flags of the training objective."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.config.options import option
from library.sdxl.prediction import SDXL_PREDICTION

NUM_TIMESTEPS = SDXL_PREDICTION.num_timesteps


@dataclass(frozen=True)
class NoiseOptions:
    """The noise added to the latents, and the timesteps that are trained."""

    _argument_group_name: ClassVar[str] = "Noise"

    noise_offset: float | None = option(
        None,
        "Add noise that is constant over each channel, at this strength. Allows learning very dark and very bright "
        "images; 0.0357 is common.",
    )
    adaptive_noise_scale: float | None = option(
        None, "Add this multiple of the absolute channel mean of the latents to --noise_offset. May be negative."
    )
    multires_noise_iterations: int | None = option(
        None, "Number of lower resolutions at which noise is added; 6 to 10 are common."
    )
    multires_noise_discount: float = option(0.3, "Strength of each lower resolution relative to the one before, 0-1.")
    min_timestep: int | None = option(None, "Train timesteps from this one on. Default: 0.")
    max_timestep: int | None = option(
        None, f"Train timesteps below this one; it is itself excluded. Default: {NUM_TIMESTEPS}."
    )

    @property
    def timestep_range(self) -> range:
        """The trained timesteps."""
        return range(self.min_timestep or 0, NUM_TIMESTEPS if self.max_timestep is None else self.max_timestep)

    @property
    def trains_all_timesteps(self) -> bool:
        """Whether no timestep is excluded."""
        return len(self.timestep_range) == NUM_TIMESTEPS

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
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
