"""Stepping chunk by chunk, with every optimizer that is installed, and what rounding does to learning."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from library.optim.known_optimizers import OPTIMIZERS
from library.optim.optimizer_probe import keys_in_bfloat16, treats_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, KAHAN, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper

CPU = torch.device("cpu")
INSTALLED = [  # one of each kind and package; test_every_optimizer.py takes all of them
    *("AdamW", "SGDNesterov", "Adafactor", "AdamW8bit", "Lion", "AdamWScheduleFree", "Prodigy", "Muon", "CAME"),
]


def options(name: str, learning_rate: float = 1e-2) -> OptimizerOptions:
    args = ADAFACTOR_RECIPE.split()[1:] if name == "Adafactor" else []
    return OptimizerOptions(optimizer_type=name, optimizer_args=args, learning_rate=learning_rate)


def after_steps(
    name: str, *, dtype: torch.dtype, rounding: str, elements_per_chunk: float, num_steps: int = 3
) -> tuple[list[Parameter], torch.optim.Optimizer]:
    """Two groups of parameters after some steps with gradients that are always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 6), (5,), (4, 3, 3, 3), (6, 6))
    parameters = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    rate = options(name).learning_rate
    groups = [
        {"name": "one", "params": parameters[:3], "lr": rate},
        {"name": "other", "params": parameters[3:], "lr": rate},
    ]
    optimizer = make_optimizer(groups, options(name))
    narrow = keys_in_bfloat16(partial(make_optimizer, options=options(name)), CPU)
    rounder = Rounder(rounding, parameters, seed=1)
    stepper = Stepper(optimizer, rounder, narrow, elements_per_chunk=elements_per_chunk)
    for step in range(1, num_steps + 1):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        stepper.step(step)
    return parameters, optimizer


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC])
def test_weights_do_not_depend_on_the_chunks_unless_the_optimizer_couples_them(name: str, rounding: str):
    kind = next(kind for kind in OPTIMIZERS if kind.name == name)
    assert treats_each_alone(partial(make_optimizer, options=options(name)), CPU) == (not kind.one_rate)
    dtype = torch.float32 if rounding == NEAREST else torch.bfloat16
    for_all = {"dtype": dtype, "rounding": rounding}
    whole, optimizer = after_steps(name, elements_per_chunk=math.inf, **for_all)
    parts, in_parts = after_steps(name, elements_per_chunk=1, **for_all)
    if kind.one_rate:
        return
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    # Settings that an optimizer changes by itself (schedule-free ones count steps there) have changed once a step.
    settings = [
        [{key: value for key, value in group.items() if key != "params"} for group in each.param_groups]
        for each in (optimizer, in_parts)
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", INSTALLED)
def test_bfloat16_keeps_its_size_in_weights_and_state(name: str):
    nearest, plain = after_steps(name, dtype=torch.bfloat16, rounding=NEAREST, elements_per_chunk=math.inf)
    rounded, optimizer = after_steps(name, dtype=torch.bfloat16, rounding=STOCHASTIC, elements_per_chunk=math.inf)
    for one, other in zip(nearest, rounded, strict=True):
        assert other.dtype == torch.bfloat16
        kept, expected = optimizer.state[other], plain.state[one]
        dtypes = [
            {key: value.dtype for key, value in state.items() if isinstance(value, torch.Tensor)}
            for state in (kept, expected)
        ]
        assert dtypes[0] == dtypes[1]


def test_compensation_costs_one_bfloat16_a_weight():
    parameters, optimizer = after_steps("AdamW", dtype=torch.bfloat16, rounding=KAHAN, elements_per_chunk=1)
    for parameter in parameters:
        residual = optimizer.state[parameter]["rounding_residual"]
        assert (residual.shape, residual.dtype) == (parameter.shape, torch.bfloat16)


def test_two_runs_of_a_seed_round_alike_and_two_seeds_do_not():
    runs = [after_steps("AdamW", dtype=torch.bfloat16, rounding=STOCHASTIC, elements_per_chunk=1)[0] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# -- learning ---------------------------------------------------------------------------------------------------------


def learnt(name: str, dtype: torch.dtype, rounding: str, *, rate: float, num_steps: int) -> tuple[float, torch.Tensor]:
    """The loss at the end of fitting a linear layer, and its weights; it starts near 1, where bfloat16 is coarse."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    target = 1 + 0.1 * torch.randn(8, 16, generator=generator)
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data = torch.ones(8, 16, dtype=dtype)
    chosen = options(name, learning_rate=rate)
    optimizer = make_optimizer([{"name": "layer", "params": [layer.weight], "lr": rate}], chosen)
    narrow = keys_in_bfloat16(partial(make_optimizer, options=chosen), CPU)
    stepper = Stepper(optimizer, Rounder(rounding, [layer.weight], seed=0), narrow)
    loss = torch.tensor(math.inf)
    for step in range(1, num_steps + 1):
        loss = (inputs @ (layer.weight.float() - target).T).square().mean()
        loss.backward()
        stepper.step(step)
        layer.weight.grad = None
    return float(loss.detach()), layer.weight.detach().float()


@pytest.mark.parametrize("name", ["Adafactor", "AdamW", "Lion"])
def test_nearest_stalls_where_stochastic_and_compensated_rounding_follow_float32(name: str):
    # bfloat16 has steps of 1/128 and 1/256 around 1, far above the steps of 5e-4 that the optimizer takes.
    course = {"rate": 5e-4, "num_steps": 400}
    exact, _ = learnt(name, torch.float32, NEAREST, **course)
    stalled, untouched = learnt(name, torch.bfloat16, NEAREST, **course)
    stochastic, _ = learnt(name, torch.bfloat16, STOCHASTIC, **course)
    compensated, _ = learnt(name, torch.bfloat16, KAHAN, **course)
    first, _ = learnt(name, torch.float32, NEAREST, rate=5e-4, num_steps=1)
    assert untouched.eq(1).all(), "not one weight has moved"
    assert stalled == pytest.approx(first, rel=1e-3)  # the inputs alone are multiplied in float32
    assert exact < 0.05 * first
    # Stochastic rounding adds noise of about the spacing above 1 to each of the 16 weights of a sum; twice at most.
    assert stochastic < exact + 16 * (2 * 2**-7) ** 2
    # Compensated weights are the nearest bfloat16: up to half a spacing away, evenly spread.
    assert compensated < exact + 16 * (2**-7) ** 2 / 12 + 0.01 * first


def test_at_a_usual_rate_most_weights_never_move_to_the_nearest_and_many_do_stochastically():
    weights = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def share_moved(rounding: str) -> float:
        parameter = Parameter(weights.bfloat16())
        optimizer = make_optimizer(
            [{"name": "unet", "params": [parameter], "lr": 1e-5}], options("Adafactor", learning_rate=1e-5)
        )
        stepper = Stepper(optimizer, Rounder(rounding, [parameter], seed=0))
        for step in range(1, 7):
            parameter.grad = torch.ones_like(parameter)
            stepper.step(step)
        return float((parameter != weights.bfloat16()).float().mean())

    # A step of 1e-5 is more than half a spacing only for weights below 0.0025: a tenth of a normal distribution of
    # 0.02. Six steps of 1e-5 are on average half a spacing of the others.
    assert share_moved(NEAREST) < 0.2
    assert share_moved(STOCHASTIC) > 0.4
