"""What each encoder is worth: losses with and without its caption to differences, their errors, and a sentence."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BOTH = "loss"
ABLATIONS = (
    *("without_l", "without_g", "without_both", "other_l", "other_g"),
    *("exchanged", "without_pooled"),
)
"""What else the encoders are told than both captions: the curves of `--validation_ablation` beside the loss."""

_NUM_TIMESTEPS = 1000
_BANDS = ("low", "middle", "high")
_LEAST_ERRORS = 2.0
"""So many standard errors a difference must exceed before anything is concluded from it."""


class Estimate(NamedTuple):
    """A mean over images and its standard error, which is NaN for a single image."""

    mean: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is above 0 by more than chance explains."""
        return self.mean > _LEAST_ERRORS * self.error

    def __str__(self) -> str:
        error = " (one image: no error is known)" if math.isnan(self.error) else f" +- {self.error:.4f}"
        return f"{self.mean:.4f}{error}"


def estimate(each: np.ndarray) -> Estimate:
    """Return mean and standard error over images, of one number for each; images that have none (NaN) do not count."""
    known = each[~np.isnan(each)]
    if len(known) == 0:
        return Estimate(math.nan, math.nan)
    error = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()), error)


@dataclass(frozen=True)
class Losses:
    """Losses by condition, float64 [images, timesteps]. A condition that an image cannot have (the caption of another
    image, where all are alike) is NaN for it, and is missing where no image can."""

    timesteps: tuple[int, ...]
    of: Mapping[str, np.ndarray]

    def mean(self, condition: str) -> float:
        """Return the mean over images and timesteps."""
        return estimate(self.of[condition].mean(axis=1)).mean

    def differences(self) -> dict[str, np.ndarray]:
        """Return what is lost or won by each change of the captions, [images, timesteps]: positive is worse."""
        of, both = self.of, self.of[BOTH]
        if "without_both" not in of:
            return {}
        against = {"l": "without_l", "g": "without_g", "own_l": "other_l", "own_g": "other_g"}
        against |= {"order": "exchanged", "pooled": "without_pooled"}
        found = {name: of[condition] - both for name, condition in against.items() if condition in of}
        # In this order of operations it is exactly 0 for a model that is blind to one of the encoders.
        found["interaction"] = (of["without_both"] - of["without_g"]) - (of["without_l"] - both)
        return found

    def worth(self) -> dict[str, Estimate]:
        """Return each difference, its mean over timesteps, and by band of noise: `l`, `l/low`, ..., `interaction`."""
        columns = {band: self._timesteps_in(band) for band in _BANDS}
        worth = {}
        for name, difference in self.differences().items():
            worth[name] = estimate(difference.mean(axis=1))
            for band, chosen in columns.items():
                if chosen.any():
                    worth[f"{name}/{band}"] = estimate(difference[:, chosen].mean(axis=1))
        return worth

    def main_band(self, difference: np.ndarray) -> str | None:
        """Return the band of noise with more than half of a difference, None if none has, or there are no others."""
        sums = {band: float(np.nansum(difference[:, self._timesteps_in(band)])) for band in _BANDS}
        present = {band_of(timestep) for timestep in self.timesteps}
        main = max(sums, key=sums.__getitem__)
        return main if len(present) > 1 and sums[main] > sum(sums.values()) / 2 else None

    def _timesteps_in(self, band: str) -> np.ndarray:
        return np.array([band_of(timestep) == band for timestep in self.timesteps])


def band_of(timestep: int) -> str:
    """Return the third of all timesteps that one is in: low, middle or high noise."""
    return _BANDS[timestep * len(_BANDS) // _NUM_TIMESTEPS]


def sentences(losses: Losses) -> Iterator[str]:
    """Yield what the differences say, in words: what L and G are worth, and where it need not be their caption."""
    differences = losses.differences()
    parts = [_part(encoder, losses, differences[encoder.lower()]) for encoder in "LG"]
    yield f"L is worth {parts[0]}; G {parts[1]}"
    for encoder in "lg":
        if _needs_any_text(losses, encoder):
            own = estimate(differences[f"own_{encoder}"].mean(axis=1))
            name = encoder.upper()
            yield (
                f"the model needs an {name}, not this {name}: the {name} caption of another image does as well (it "
                f"costs {own})"
            )


def _part(encoder: str, losses: Losses, difference: np.ndarray) -> str:
    """Return "0.0031 +- 0.0004 (2.1 %), mostly at high noise"."""
    worth = estimate(difference.mean(axis=1))
    said = f"{worth} ({100 * worth.mean / losses.mean(BOTH):.1f} %)"
    if not worth.is_clear:
        unclear = "too few images to tell" if math.isnan(worth.error) else "no more than chance explains"
        return f"{said}, {unclear}"
    band = losses.main_band(difference)
    return said if band is None else f"{said}, mostly at {band} noise"


def _needs_any_text(losses: Losses, encoder: str) -> bool:
    """Return whether another image's caption does as well as its own, while none does not."""
    other = losses.of.get(f"other_{encoder}")
    if other is None:
        return False
    without, both = losses.of[f"without_{encoder}"], losses.of[BOTH]
    worth, own, any_text = (estimate(each.mean(axis=1)) for each in (without - both, other - both, without - other))
    return worth.is_clear and any_text.is_clear and not own.is_clear
