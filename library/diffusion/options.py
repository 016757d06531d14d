"""The flags of the training objective."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

from library.config.options import changed_options, option
from library.sdxl.prediction import SDXL_PREDICTION

NUM_TIMESTEPS = SDXL_PREDICTION.num_timesteps
_STRONGEST = 10.0  # the noise itself has strength 1
_MOST_HALVINGS = 64


@dataclass(frozen=True)
class NoiseOptions:
    """The noise added to the latents."""

    _argument_group_name: ClassVar[str] = "Noise"

    noise_offset: float | None = option(
        None,
        "Add noise that is constant over each channel, at this strength. Allows learning very dark and very bright "
        "images; 0.0357 is common.",
        least=0,
        most=_STRONGEST,
    )
    noise_offset_random_strength: bool = option(
        False, "Draw the strength of --noise_offset for each image, from 0 to what is set."
    )
    adaptive_noise_scale: float | None = option(
        None,
        "Add this multiple of the absolute channel mean of the latents to --noise_offset. May be negative.",
        least=-_STRONGEST,
        most=_STRONGEST,
    )
    multires_noise_iterations: int | None = option(
        None,
        "Number of lower resolutions at which noise is added; 6 to 10 are common. Sizes are drawn, and the sum is "
        "scaled to unit variance, for each image.",
        least=0,
        most=_MOST_HALVINGS,
    )
    multires_noise_discount: float = option(
        0.3, "Strength of each lower resolution relative to the one before, 0-1.", least=0, most=1
    )
    ip_noise_gamma: float | None = option(
        None,
        "Input perturbation: add further noise of this strength to what the U-Net sees, not to its target (Ning et al. "
        "2023); 0.1 is common. 0 disables it.",
        least=0,
        most=_STRONGEST,
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "Draw the strength of --ip_noise_gamma for each image, from 0 to what is set."
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            yield "--adaptive_noise_scale changes --noise_offset, which is not set; set it too."
        for flag in ("noise_offset", "ip_noise_gamma"):
            if getattr(self, f"{flag}_random_strength") and not getattr(self, flag):
                yield f"--{flag}_random_strength draws the strength of --{flag}, which is not set; set it too."


UNIFORM, SIGMOID, LOGIT_NORMAL, SHIFT = "uniform", "sigmoid", "logit_normal", "shift"
_LEAST_SPREAD, _MOST_SPREAD = 0.01, 100.0
_LEAST_MASS = 1e-6


@dataclass(frozen=True)
class TimestepOptions:
    """Which timesteps are trained, and how often."""

    _argument_group_name: ClassVar[str] = "Timesteps"

    min_timestep: int | None = option(
        None, "Train timesteps from this one on. Default: 0.", least=0, most=NUM_TIMESTEPS - 1
    )
    max_timestep: int | None = option(
        None,
        f"Train timesteps below this one; it is itself excluded. Default: {NUM_TIMESTEPS}.",
        least=1,
        most=NUM_TIMESTEPS,
    )
    timestep_sampling: str = option(
        UNIFORM,
        "How timesteps are drawn: all alike; sigmoid and logit_normal favour the middle; shift, made for flows, "
        "favours strong noise. --min_timestep and --max_timestep cut the distribution off.",
        choices=(UNIFORM, SIGMOID, LOGIT_NORMAL, SHIFT),
    )
    sigmoid_scale: float = option(
        1.0,
        "Spread of --timestep_sampling sigmoid and shift: the factor of the normal number inside the sigmoid.",
        least=_LEAST_SPREAD,
        most=_MOST_SPREAD,
    )
    logit_mean: float = option(
        0.0, "Mean of --timestep_sampling logit_normal; above 0 favours strong noise.", least=-20, most=20
    )
    logit_std: float = option(
        1.0, "Standard deviation of --timestep_sampling logit_normal.", least=_LEAST_SPREAD, most=_MOST_SPREAD
    )
    discrete_flow_shift: float = option(
        3.0,
        "Shift of --timestep_sampling shift: s becomes shift * s / (1 + (shift - 1) * s). 1 shifts nothing.",
        least=0.001,
        most=1000,
    )
    stratified_timesteps: bool = option(
        False,
        "Spread the timesteps of the images of an optimizer step evenly over the distribution: the same mean with less "
        "variance.",
    )

    @property
    def timestep_range(self) -> range:
        """The trained timesteps."""
        return range(self.min_timestep or 0, NUM_TIMESTEPS if self.max_timestep is None else self.max_timestep)

    @property
    def trains_all_timesteps(self) -> bool:
        """Whether no timestep is excluded."""
        return len(self.timestep_range) == NUM_TIMESTEPS

    @property
    def logit_normal(self) -> NormalDist | None:
        """The distribution of the logit of the timestep as a fraction; None for the uniform distribution of itself."""
        if self.timestep_sampling == UNIFORM:
            return None
        if self.timestep_sampling == LOGIT_NORMAL:
            return NormalDist(self.logit_mean, self.logit_std)
        # A shift multiplies the odds, so that it moves the logit.
        shift = self.discrete_flow_shift if self.timestep_sampling == SHIFT else 1.0
        return NormalDist(math.log(shift), self.sigmoid_scale)

    @property
    def mass_below(self) -> tuple[float, float]:
        """Which fractions of all draws would lie below the first trained timestep, and below the end of the range."""
        trained, normal = self.timestep_range, self.logit_normal
        fractions = trained.start / NUM_TIMESTEPS, trained.stop / NUM_TIMESTEPS
        below, up_to = (each if normal is None else _mass_below(each, normal) for each in fractions)
        return below, up_to

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        trained = self.timestep_range
        if not trained:
            yield (
                f"--min_timestep {trained.start} and --max_timestep {trained.stop} leave nothing to train; "
                f"they must satisfy 0 <= min < max <= {NUM_TIMESTEPS}."
            )
        for flag in changed_options(self, _SAMPLINGS_OF_PARAMETER):
            samplings = _SAMPLINGS_OF_PARAMETER[flag]
            if self.timestep_sampling not in samplings:
                yield (
                    f"--{flag} has no effect on --timestep_sampling {self.timestep_sampling}; it belongs to "
                    f"{' and '.join(samplings)}."
                )
        below, up_to = self.mass_below
        if trained and up_to - below < _LEAST_MASS:
            yield (
                f"--timestep_sampling {self.timestep_sampling} draws next to nothing between --min_timestep "
                f"{trained.start} and --max_timestep {trained.stop}; widen the range or the distribution."
            )


_SAMPLINGS_OF_PARAMETER = {
    "sigmoid_scale": (SIGMOID, SHIFT),
    "logit_mean": (LOGIT_NORMAL,),
    "logit_std": (LOGIT_NORMAL,),
    "discrete_flow_shift": (SHIFT,),
}


def _mass_below(fraction: float, normal: NormalDist) -> float:
    if not 0 < fraction < 1:
        return float(fraction >= 1)
    return normal.cdf(math.log(fraction / (1 - fraction)))
