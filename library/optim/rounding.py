"""How new weights become bfloat16 again, so that steps far smaller than its spacing are not lost.

bfloat16 has 8 bits of mantissa: the neighbours of 1 are 1/128 above and 1/256 below, and a step of 1e-5 rounds to no
step at all. Stochastic rounding takes the upper neighbour as often as the value is close to it, so that the mean is the
value (Gupta et al. 2015, https://arxiv.org/abs/1502.02551); compensation keeps what rounding cut off (Kahan 1965).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from library.config.digests import digest
from library.optim.kernels import compiled

RESIDUAL = "rounding_residual"
"""Key of an optimizer's state: what rounding has cut off the weights so far, in bfloat16."""

_SPREAD = -1640531527
_LOW_HALF = 0xFFFF
"""The 16 bits of a float32 that bfloat16 does not have."""


def stochastically_rounded(values: Tensor, seed: int | Tensor) -> Tensor:
    """Return float32 `values` in bfloat16, rounded up or down at random with the value as the mean; Inf and NaN stay.

    The random numbers are a function of `seed` (32 bits, signed; or one for each number) and of the position in the
    tensor: there is no generator whose state would have to be saved. In the sign-and-magnitude bits of a float32,
    adding 16 random bits below the mantissa of bfloat16 carries into it with exactly the right probability.
    """
    position = torch.arange(values.numel(), dtype=torch.int32, device=values.device).view(values.shape)
    bits = (values.view(torch.int32) + (_hashed(position, seed) & _LOW_HALF)) & ~_LOW_HALF
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


def _hashed(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Return 32 random bits for each number, as `lowbias32` of C. Wellons' hash-prospector (2018) does.

    int32 wraps around; its shifts copy the sign, so that the upper bits have to be masked off.
    """
    bits = counter * _SPREAD + seed  # 2**32 / golden ratio: neighbours differ in all bits
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B
    return bits ^ ((bits >> 16) & 0xFFFF)


def seed_of_part(seed: int, first: int) -> int:
    """Return the seed with which a part of a tensor, from its number `first` on, is rounded as within the whole.

    The bits of a number depend on its position times a constant, plus the seed.
    """
    moved = (seed + first * _SPREAD) & 0xFFFFFFFF
    return moved - 2**32 if moved >= 2**31 else moved


round_stochastically = compiled(stochastically_rounded)


def with_residual(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest bfloat16 of float32 `values`, and the difference in bfloat16: 16 bits of mantissa in all.

    Rounding works on the bits, half to even: a compiler would optimize a cast to bfloat16 and back away.
    """
    bits = values.view(torch.int32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~_LOW_HALF).view(torch.float32)
    nearest = torch.where(values.isfinite(), nearest, values)
    residual = torch.where(nearest.isfinite(), values - nearest, 0.0)
    return nearest.to(torch.bfloat16), residual.to(torch.bfloat16)


class Rounder:
    """The rounding of a run: its kind, and a seed for each parameter at each step.

    A seed depends on the seed of the run, the step and the position among `parameters` alone, so that a resumed run
    rounds like one that was never stopped, and every process rounds alike. Of parameters that are parts of weights,
    `first_element` returns where in the weight they begin: they round as the whole does.
    """

    def __init__(
        self,
        kind: str,
        parameters: Iterable[Parameter],
        seed: int,
        first_element: Callable[[Parameter], int] | None = None,
    ):
        self.kind = kind
        self._places = {parameter: place for place, parameter in enumerate(parameters)}
        self._first_elements = {} if first_element is None else {each: first_element(each) for each in self._places}
        self._seed = seed
        self._step = 0

    def start(self, step: int) -> None:
        """Begin optimizer step `step`."""
        self._step = step

    def seed(self, parameter: Parameter, what: str = "weights") -> int:
        """Return the seed for `what` of a parameter in this step: 32 bits, signed."""
        text = f"{self._seed}/{self._step}/{self._places[parameter]}/{what}"
        seed = int.from_bytes(digest([text.encode()], 4), "little", signed=True)
        return seed_of_part(seed, self._first_elements.get(parameter, 0))
