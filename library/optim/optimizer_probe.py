"""What an optimizer is like, found by trying it on a few numbers instead of from a list of names."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from library.config.errors import UserError
from library.optim.kernels import without_compiling
from library.optim.options import NEAREST, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper

_SHAPES = ((80, 80), (6400,), (80, 8, 3, 3))
"""A matrix, a vector and a convolution, large enough for those that keep 8 bits only of large weights."""

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""From parameter groups to the run's optimizer over them."""


def keys_in_bfloat16(make: MakeOptimizer, device: torch.device) -> frozenset[str]:
    """Return the state kept in bfloat16 for bfloat16 weights; in float32 it would take twice the memory.

    What is in bfloat16 beside float32 weights too is not among it: the optimizer rounds that by itself.
    """
    return frozenset().union(*(_narrow_keys(make, shape, device) for shape in _SHAPES))


def _narrow_keys(make: MakeOptimizer, shape: tuple[int, ...], device: torch.device) -> set[str]:
    narrow, wide = (
        {key for key, value in state_beside(make, shape, dtype, device).items() if value.dtype == torch.bfloat16}
        for dtype in (torch.bfloat16, torch.float32)
    )
    return narrow - wide


def state_beside(
    make: MakeOptimizer, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors that the optimizer keeps for a weight of this shape, after a first step: before it has none.

    Each kind of weight is shown alone: some optimizers treat a matrix in another way than a vector or a convolution.
    """
    parameter = _probe(shape, dtype, device)
    optimizer = _over(make, parameter)
    with without_compiling():
        optimizer.step()
    return {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def bytes_of_state_a_weight(
    make: MakeOptimizer, num_dimensions: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the bytes that the optimizer keeps for each number of a weight of 1, 2 or 4 dimensions, as SDXL has."""
    shape = {1: (256**2,), 2: (256, 256), 4: (256, 28, 3, 3)}.get(num_dimensions, (256, *(16,) * (num_dimensions - 1)))
    kept = state_beside(make, shape, dtype, device).values()
    return sum(value.numel() * value.dtype.itemsize for value in kept) / math.prod(shape)


def treats_each_alone(make: MakeOptimizer, device: torch.device) -> bool:
    """Return whether the update of a parameter is the same, to the last bit, whichever others are stepped with it.

    What the optimizer keeps in the settings of its group, such as a rate that it finds, must be the same, too.
    """
    together, alone = (_after_a_few_steps(make, device, elements) for elements in (math.inf, 1))
    return all(_equal(one, other) for one, other in zip(together, alone, strict=True))


def can_step_in_parts(make: MakeOptimizer, device: torch.device) -> bool:
    """Return whether the optimizer can be shown rows of weights: the same updates, to the last bit, or it says so."""
    if getattr(_over(make, _probe((1,), torch.float32, device)), "steps_in_parts", False):
        return True
    (whole, settings), *parts = (_stepped(make, slice(*rows), device) for rows in ((0, 80), (0, 37), (37, 80)))
    same_settings = all(_equal(settings[name], of_part[name]) for _, of_part in parts for name in settings)
    return same_settings and torch.equal(whole, torch.cat([rows for rows, _ in parts]))


def _stepped(make: MakeOptimizer, rows: slice, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Return rows of a matrix, and the settings of their group, after some steps on them alone.

    The gradients have both signs and all sizes: what only follows the sign shows how exactly it knows the rest.
    """
    parameter = Parameter(torch.linspace(-1, 1, 6400, device=device).view(80, 80)[rows].clone())
    optimizer = make([{"name": "probe", "params": [parameter], "lr": 1.0}])  # those that find a rate expect 1
    for step in range(1, 13):
        gradient = torch.linspace(0.1 * step, 700 * step, 6400, device=device).sin().pow(5).view(80, 80)
        parameter.grad = gradient[rows].clone()
        with without_compiling():
            optimizer.step()
    [group] = optimizer.param_groups
    return parameter.detach(), {name: value for name, value in group.items() if name != "params"}


def require_each_alone(make: MakeOptimizer, options: OptimizerOptions, device: torch.device) -> bool:
    """Return `treats_each_alone`. Raise `UserError` if it has to and does not."""
    each_alone = treats_each_alone(make, device)
    if not each_alone and options.fused_backward_pass:
        raise UserError(
            f"--fused_backward_pass cannot work with {options.optimizer_type}, which needs all gradients before it "
            "updates the first weight.",
            "Choose another --optimizer_type, such as Adafactor, or leave out --fused_backward_pass.",
        )
    if not each_alone and options.offload_optimizer:
        raise UserError(
            f"--offload_optimizer cannot work with {options.optimizer_type}, which needs all of its state at once.",
            "Choose another --optimizer_type, such as AdamW, or leave out --offload_optimizer.",
        )
    return each_alone


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _after_a_few_steps(make: MakeOptimizer, device: torch.device, elements_per_chunk: float) -> list[Any]:
    """Return the parameters and the settings of their group after some steps."""
    parameters = [_probe(shape, torch.float32, device) for shape in ((6, 4), (5,), (3, 2, 3, 3))]
    optimizer = make([{"name": "probe", "params": parameters, "lr": 1.0}])  # those that find a rate expect 1
    stepper = Stepper(optimizer, Rounder(NEAREST, parameters, seed=0), elements_per_chunk=elements_per_chunk)
    for step in range(1, 13):  # one that finds a rate has found another one by then
        for scale, parameter in enumerate(parameters, start=1):
            parameter.grad = torch.full_like(parameter, 0.1 * step * scale)
        with without_compiling():
            stepper.step(step)
    [group] = optimizer.param_groups
    return [*parameters, *(value for name, value in sorted(group.items()) if name != "params")]


def _over(make: MakeOptimizer, parameter: Parameter) -> Optimizer:
    return make([{"name": "probe", "params": [parameter], "lr": 1e-3}])


def _probe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Parameter:
    values = torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device=device).view(shape)
    parameter = Parameter(values)
    parameter.grad = torch.ones_like(values)
    return parameter
