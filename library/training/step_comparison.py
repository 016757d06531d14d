"""Two ways to take the same step, compared: where weights and the optimizer's means have moved to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_SAMPLED = 4096
"""Numbers that are compared of each tensor: those of all would take as much memory on the GPU as the weights."""
_PREDICTION, _MOVEMENT = 0.02, 0.2
"""How far apart two predictions, and two movements, may be, as shares of their size, where kernels add up in any order.
With a rate, a seed or a batch of another step a movement would be as far off as it is long."""


class StepComparison:
    """Takes note of weights and states, on the host, before a step that is taken twice."""

    def __init__(self, parameters: Sequence[Parameter], states: Mapping[Tensor, dict[str, Any]]):
        self._parameters = parameters
        self._states = states
        self._kept = [each.to("cpu", copy=True) for each in self._tensors()]
        self._counts = [states[each]["step"] for each in parameters]
        self._before, self._first = self._samples(), list[Tensor]()

    def has_moved(self) -> bool:
        """Return whether a weight is another one than before."""
        weights = slice(0, len(self._parameters))
        return not all(map(torch.equal, self._before[weights], self._samples()[weights]))

    def keep_and_put_back(self) -> None:
        """Keep where the first step has led, and undo it."""
        self._first = self._samples()
        for tensor, kept in zip(self._tensors(), self._kept, strict=True):
            tensor.copy_(kept)
        for parameter, count in zip(self._parameters, self._counts, strict=True):
            self._states[parameter]["step"] = count
        self._kept.clear()

    def difference(self, *, is_exact: bool) -> str | None:
        """Return in what the second step differs from the first, None if it does not."""
        second, num_weights = self._samples(), len(self._parameters)
        for name, part in (("the weights", slice(0, num_weights)), ("the means", slice(num_weights, None))):
            one, other = (
                torch.cat(
                    [after.float() - before.float() for after, before in zip(found, self._before, strict=True)][part]
                )
                for found in (self._first, second)
            )
            if is_exact:
                if not all(map(torch.equal, self._first[part], second[part])):
                    return f"{name}, bit for bit"
            elif not bool((one - other).norm() <= _MOVEMENT * one.norm()):
                return f"{name}, by {float((one - other).norm() / one.norm()):.0%} of their movement"
        return None

    @staticmethod
    def is_near(one: Tensor, other: Tensor, *, is_exact: bool) -> bool:
        """Return whether two predictions are the same, but for the order of sums."""
        return torch.equal(one, other) if is_exact else bool((one - other).norm() <= _PREDICTION * one.norm())

    def _tensors(self) -> list[Tensor]:
        states = [value for each in self._parameters for value in self._states[each].values()]
        return [each.detach() for each in (*self._parameters, *states) if isinstance(each, Tensor)]

    def _samples(self) -> list[Tensor]:
        flat = [each.reshape(-1) for each in self._tensors()]
        return [each[:: -(-each.numel() // _SAMPLED)].clone() for each in flat]
