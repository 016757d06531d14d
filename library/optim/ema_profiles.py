"""How moving averages forget: decays with warm-up, power functions, and combinations of those that were kept.

A power function of t weighs step s of t with s ** exponent. Its width is a fraction of the run whatever t is, and the
profile of any width is nearly a linear combination of a few that were kept, so that it can be chosen afterwards
(Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C,
https://arxiv.org/abs/2312.02696).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a mistake on the command line is answered before it is imported
    import numpy as np
    from numpy.typing import NDArray

LEAST_SIGMA_REL = 0.005
MOST_SIGMA_REL = 0.28
"""Widths relative to the run. From 1 / sqrt(12) = 0.289 on, a power function would weigh early steps more than late."""


class Profile(Protocol):
    """How an average forgets."""

    def kept(self, before: int, now: int) -> float:
        """Return which part (0-1) of the average after `before` updates' worth of steps is left after `now`."""


@dataclass(frozen=True)
class Decay:
    """A constant decay with warm-up, by default (1 + t) / (10 + t), with a `power` 1 - (1 + t) ** -power.

    The decays are those of diffusers' `EMAModel` with `use_ema_warmup` for a `power`.
    """

    decay: float
    power: float | None = None

    def at(self, step: int) -> float:
        """Return the decay of step `step` (from 1) of the average."""
        before = step - 1
        if before == 0:
            return 0.0
        warm = (1 + before) / (10 + before) if self.power is None else 1 - (1 + before) ** -self.power
        return min(self.decay, warm)

    def kept(self, before: int, now: int) -> float:
        """Return the product of the decays of the steps between."""
        return math.prod(self.at(step) for step in range(before + 1, now + 1))


@dataclass(frozen=True)
class PowerFunction:
    """The profile of equation 2 of the paper; `sigma_rel` is its standard deviation as a fraction of the run."""

    sigma_rel: float

    @cached_property
    def exponent(self) -> float:
        """The paper's gamma, from sigma_rel ** 2 = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))."""
        import numpy as np

        inverse = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def kept(self, before: int, now: int) -> float:
        """Return the product of the paper's beta(t) = (1 - 1 / t) ** (gamma + 1) over the steps between."""
        return float((before / now) ** (self.exponent + 1))


@dataclass(frozen=True)
class Moment:
    """A power function and the number of steps that it has averaged."""

    profile: PowerFunction
    num_steps: int


@dataclass(frozen=True)
class Combination:
    """What the kept averages are multiplied by to be another one; the sum is 1, so that weights keep their size.

    `error` is the distance to the profile that was asked for, relative to its own norm.
    """

    factors: list[float]
    error: float


_MOST_BINS = 4096
"""Runs of more steps are compared in so many bins; a profile is smooth within one."""


def combination(kept: Sequence[Moment], wanted: Moment) -> Combination:
    """Return the combination of `kept` averages that is nearest to the `wanted` one, by least squares of profiles.

    The paper takes integrals of profiles (algorithm 3); sums over the steps are exact for short runs as well.
    """
    import numpy as np

    num_steps = max(each.num_steps for each in (*kept, wanted))
    edges = np.linspace(0, num_steps, min(num_steps, _MOST_BINS) + 1)
    profiles = np.stack([_weights(each, edges) for each in kept])
    target = _weights(wanted, edges)
    number = len(kept)
    # Least squares under the condition that the factors add up to 1, by a Lagrange multiplier.
    system = np.zeros((number + 1, number + 1))
    system[:number, :number] = profiles @ profiles.T
    system[number, :number] = system[:number, number] = np.square(target).sum()  # of the size of the other numbers
    goal = np.append(profiles @ target, np.square(target).sum())
    factors = np.linalg.lstsq(system, goal, rcond=None)[0][:number]
    error = np.linalg.norm(factors @ profiles - target) / np.linalg.norm(target)
    return Combination([float(factor) for factor in factors], float(error))


def _weights(moment: Moment, edges: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return how much the steps between two edges each count in an average; the sum is 1."""
    import numpy as np

    return np.diff(np.minimum(edges / moment.num_steps, 1) ** (moment.profile.exponent + 1))
