"""The flags of the training objective."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.config.options import option
from library.sdxl.prediction import SDXL_PREDICTION

NUM_TIMESTEPS = SDXL_PREDICTION.num_timesteps
_STRONGEST = 10.0  # the noise itself has strength 1
_MOST_HALVINGS = 64


@dataclass(frozen=True)
class NoiseOptions:
    """The noise added to the latents, and the timesteps that are trained."""

    _argument_group_name: ClassVar[str] = "Noise"

    noise_offset: float | None = option(
        None,
        "Add noise that is constant over each channel, at this strength. Allows learning very dark and very bright "
        "images; 0.0357 is common.",
        least=0,
        most=_STRONGEST,
    )
    adaptive_noise_scale: float | None = option(
        None,
        "Add this multiple of the absolute channel mean of the latents to --noise_offset. May be negative.",
        least=-_STRONGEST,
        most=_STRONGEST,
    )
    multires_noise_iterations: int | None = option(
        None, "Number of lower resolutions at which noise is added; 6 to 10 are common.", least=0, most=_MOST_HALVINGS
    )
    multires_noise_discount: float = option(
        0.3, "Strength of each lower resolution relative to the one before, 0-1.", least=0, most=1
    )
    min_timestep: int | None = option(
        None, "Train timesteps from this one on. Default: 0.", least=0, most=NUM_TIMESTEPS - 1
    )
    max_timestep: int | None = option(
        None,
        f"Train timesteps below this one; it is itself excluded. Default: {NUM_TIMESTEPS}.",
        least=1,
        most=NUM_TIMESTEPS,
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
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            yield "--adaptive_noise_scale changes --noise_offset, which is not set; set it too."
        trained = self.timestep_range
        if not trained:
            yield (
                f"--min_timestep {trained.start} and --max_timestep {trained.stop} leave nothing to train; "
                f"they must satisfy 0 <= min < max <= {NUM_TIMESTEPS}."
            )
