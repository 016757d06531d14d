"""Adafactor's step by functions of lists, which a GPU without Triton takes, against the step weight by weight."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

from library.optim.adafactor import Adafactor
from library.optim.chunked_adafactor import ChunkedSteps
from library.optim.options import KAHAN, NEAREST, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder

SHAPES = ((40, 30), (7,), (40, 30), (6, 5, 3, 3), (7,), (4, 6, 1, 1), (12,))
CASES = (
    (torch.bfloat16, STOCHASTIC, False),
    (torch.bfloat16, STOCHASTIC, True),
    (torch.bfloat16, KAHAN, True),
    (torch.bfloat16, NEAREST, False),
    (torch.float32, None, False),
)


def optimizer_of(dtype: torch.dtype, rounding: str | None, *, flatten: bool) -> tuple[list[Parameter], Adafactor]:
    torch.manual_seed(0)
    parameters = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    settings = {"relative_step": False, "scale_parameter": False, "weight_decay": 0.01, "clip_threshold": 0.7}
    optimizer = Adafactor(parameters, lr=1e-3, flatten_convolutions=flatten, **settings)
    optimizer.rounder = None if rounding is None else Rounder(rounding, parameters, seed=3)
    return parameters, optimizer


def take_gradients(parameters: list[Parameter], step: int) -> None:
    torch.manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)


def step_by_lists(parameters: list[Parameter], optimizer: Adafactor, is_finite: torch.Tensor | None = None) -> None:
    ChunkedSteps(with_triton=False).step(
        parameters, optimizer.param_groups[0], optimizer.state, optimizer.rounder, is_finite
    )


@pytest.mark.parametrize(("dtype", "rounding", "flatten"), CASES)
def test_lists_step_as_weight_by_weight_within_a_rounding(dtype: torch.dtype, rounding: str | None, flatten: bool):
    usual, one = optimizer_of(dtype, rounding, flatten=flatten)
    listed, other = optimizer_of(dtype, rounding, flatten=flatten)
    for step in range(1, 4):
        one.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 1e-3 / step
        for parameters, optimizer in ((usual, one), (listed, other)):
            if optimizer.rounder is not None:
                optimizer.rounder.start(step)
            take_gradients(parameters, step)
        one.step()
        step_by_lists(listed, other)
    for weight, found in zip(usual, listed, strict=True):
        if dtype == torch.bfloat16:
            assert (weight == found).float().mean() > 0.98
        torch.testing.assert_close(found, weight, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=2e-7)
        assert one.state[weight].keys() == other.state[found].keys()
        for key, value in one.state[weight].items():
            kept = other.state[found][key]
            if key == RESIDUAL:
                torch.testing.assert_close(found.float() + kept, weight.float() + value, rtol=2**-14, atol=1e-6)
            elif isinstance(value, torch.Tensor):
                torch.testing.assert_close(kept, value, rtol=1e-6, atol=1e-6 * value.abs().max().item())
            else:
                assert kept == value


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(("dtype", "rounding", "flatten"), CASES)
def test_a_loss_that_is_not_finite_changes_no_bit(
    dtype: torch.dtype, rounding: str | None, flatten: bool, num_steps: int
):
    parameters, optimizer = optimizer_of(dtype, rounding, flatten=flatten)
    for step in range(1, num_steps + 1):
        take_gradients(parameters, step)
        step_by_lists(parameters, optimizer)
    weights, states = copy.deepcopy(parameters), copy.deepcopy([dict(optimizer.state[each]) for each in parameters])
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    step_by_lists(parameters, optimizer, torch.tensor(0, dtype=torch.int32))
    for parameter, before, state in zip(parameters, weights, states, strict=True):
        assert torch.equal(parameter, before)
        for key, value in state.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(optimizer.state[parameter][key], value)
