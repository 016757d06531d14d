"""What an optimizer is like, found by trying it on a few numbers instead of from a list of names."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.options import NEAREST
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""From parameter groups to the run's optimizer over them."""


def keys_in_bfloat16(make: MakeOptimizer, device: torch.device) -> frozenset[str]:
    """Return the state kept in bfloat16 for bfloat16 weights; in float32 it would take twice the memory."""
    kept = state_beside_matrix(make, 80, torch.bfloat16, device).items()
    return frozenset(key for key, value in kept if value.dtype == torch.bfloat16)


def state_beside_matrix(make: MakeOptimizer, side: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors that the optimizer keeps for a matrix [side, side], after a first step: before it has none."""
    parameter = _probe((side, side), dtype, device)
    optimizer = make([{"name": "probe", "params": [parameter], "lr": 1e-3}])
    optimizer.step()
    return {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def treats_each_alone(make: MakeOptimizer, device: torch.device) -> bool:
    """Return whether the update of a parameter is the same, to the last bit, whichever others are stepped with it."""
    together, alone = (_after_a_few_steps(make, device, elements) for elements in (math.inf, 1))
    return all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def _after_a_few_steps(make: MakeOptimizer, device: torch.device, elements_per_chunk: float) -> list[Parameter]:
    parameters = [_probe(shape, torch.float32, device) for shape in ((6, 4), (5,), (3, 2, 3, 3))]
    optimizer = make([{"name": "probe", "params": parameters, "lr": 1.0}])  # those that find a rate expect 1
    stepper = Stepper(optimizer, Rounder(NEAREST, parameters, seed=0), elements_per_chunk=elements_per_chunk)
    for step in range(1, 13):  # one that finds a rate has found another one by then
        for scale, parameter in enumerate(parameters, start=1):
            parameter.grad = torch.full_like(parameter, 0.1 * step * scale)
        stepper.step(step)
    return parameters


def _probe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Parameter:
    values = torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device=device).view(shape)
    parameter = Parameter(values)
    parameter.grad = torch.ones_like(values)
    return parameter
