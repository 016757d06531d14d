"""Run by test_chunked_adafactor.py with TRITON_INTERPRET=1: Adafactor's programs against the step weight by weight."""

import copy
import math
import sys
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch.nn import Parameter

from library.config.errors import UserError
from library.optim import chunk_programs as programs
from library.optim import triton_launches
from library.optim.adafactor import Adafactor
from library.optim.chunked_adafactor import ChunkedSteps
from library.optim.options import KAHAN, NEAREST, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder, stochastically_rounded, with_residual
from library.optim.rounding_together import Narrowed, RoundingTogether, Wide
from library.optim.triton_trial import why_not

SHAPES = ((40, 300), (7,), (512,), (6, 5, 3, 3), (4, 6, 1, 1), (1, 9))
CASES = {
    "stochastic": (torch.bfloat16, STOCHASTIC, False),
    "stochastic, flattened": (torch.bfloat16, STOCHASTIC, True),
    "kahan": (torch.bfloat16, KAHAN, True),
    "nearest": (torch.bfloat16, NEAREST, True),
    "float32": (torch.float32, None, False),
}
MEANS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
ROUNDED = {STOCHASTIC: 2**-7, NEAREST: 2**-8, KAHAN: 2**-16, None: 2**-22}
"""How far from the exact value, as a share of it, rounding may lead: to one of the two neighbours in bfloat16, to the
nearer one, the same of what is cut off, and some roundings of float32."""


def draw(shape, seed, dtype, *, exact):
    """Numbers whose squares add up to the same sum in every order, if `exact`."""
    generator = torch.Generator().manual_seed(seed)
    if not exact:
        return torch.randn(shape, generator=generator).to(dtype)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (signs * torch.exp2(torch.randint(-3, 1, shape, generator=generator).float())).to(dtype)


def compare(name, *, exact):
    dtype, rounding, flatten = CASES[name]
    settings = {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.01}
    settings |= {"flatten_convolutions": flatten, "clip_threshold": 1e3 if exact else 0.7}
    usual = [Parameter(draw(shape, 0, dtype, exact=False)) for shape in SHAPES]
    chunked = [copy.deepcopy(each) for each in usual]
    optimizers = [Adafactor(parameters, **settings) for parameters in (usual, chunked)]
    rounders = [None if rounding is None else Rounder(rounding, each, seed=3) for each in (usual, chunked)]
    optimizers[0].rounder = rounders[0]
    steps, state = ChunkedSteps(with_triton=True), optimizers[1].state
    for step in range(1, 4):
        for rounder in rounders:
            if rounder is not None:
                rounder.start(step)
        for parameters in (usual, chunked):
            for index, parameter in enumerate(parameters):
                parameter.grad = draw(parameter.shape, 100 * step + index, dtype, exact=exact)
        optimizers[0].step()
        steps.step(chunked, optimizers[1].param_groups[0], state, rounders[1], None)
    for one, other in zip(usual, chunked, strict=True):
        # Means are updated with one rounding more than in torch's fused operation: one unit in the last place.
        same = (one == other).float().mean()
        if one.dtype == torch.bfloat16:
            assert same > (0.999 if exact else 0.98), (name, tuple(one.shape), same)
        torch.testing.assert_close(other, one, rtol=2**-7 if one.dtype == torch.bfloat16 else 2e-6, atol=2e-7)
        for key, value in optimizers[0].state[one].items():
            found = state[other][key]
            if key == RESIDUAL:  # a weight between two neighbours may have taken the other one: what counts is the sum
                torch.testing.assert_close(other.float() + found, one.float() + value, rtol=2**-14, atol=1e-6)
            elif isinstance(value, torch.Tensor):
                tolerance = 1e-6
                torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance * value.abs().max().item())
            else:
                assert found == value
    before = [each.detach().clone() for each in chunked], copy.deepcopy([dict(state[each]) for each in chunked])
    for parameter in chunked:
        parameter.grad = torch.full_like(parameter, float("nan"))
    steps.step(chunked, optimizers[1].param_groups[0], state, rounders[1], torch.tensor(0, dtype=torch.int32))
    for parameter, weights, kept in zip(chunked, *before, strict=True):
        assert torch.equal(parameter, weights), "a loss that is not finite changes no weight"
        for key, value in kept.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(state[parameter][key], value)


@triton.jit
def round_all(values, out, seed, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, programs.rounded_at_random(tl.load(values + at, at < count), at, seed), at < count)


def compare_rounding():
    """Stochastic rounding: bit for bit, NaN and infinities included."""
    torch.manual_seed(0)
    values = torch.randn(5000) * torch.logspace(-30, 30, 5000)
    values[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38])
    for seed in (0, 1, -1, 123456789, -(2**31), 2**31 - 1):
        ours = torch.empty(values.shape, dtype=torch.bfloat16)
        round_all[(triton.cdiv(len(values), 1024),)](values, ours, seed, len(values), BLOCK=1024)
        expected = stochastically_rounded(values, seed)
        assert torch.equal(ours.view(torch.int16)[3:], expected.view(torch.int16)[3:])
        assert ours[2].isnan()
        assert torch.equal(ours[:2], expected[:2])
    print("rounding: bit for bit the same", flush=True)


def compare_rounding_together():
    """Many tensors in one launch: at random and with what is cut off, bit for bit."""
    torch.manual_seed(1)
    wide = [Wide(torch.randn(size), seed) for size, seed in ((5000, 7), (3, -9), (1024, None), (40, None))]
    wide[0].values[:3] = wide[2].values[:3] = torch.tensor([float("inf"), -0.0, 3.4e38])
    narrowed = [
        Narrowed(*(torch.empty_like(each.values, dtype=torch.bfloat16) for _ in range(1 + (each.seed is None))))
        for each in wide
    ]
    RoundingTogether().launch(wide, narrowed)
    for each, found in zip(wide, narrowed, strict=True):
        if each.seed is None:
            values, residual = with_residual(each.values)
            assert torch.equal(found.residual, residual)
        else:
            values = stochastically_rounded(each.values, each.seed)
        assert torch.equal(found.values.view(torch.int16), values.view(torch.int16))
    print("rounding together: bit for bit the same", flush=True)


def require_the_same_flattening():
    """A state of kernels taken one by one is refused where they are to be flattened, and the other way round."""
    for before in (False, True):
        weights = [Parameter(torch.ones(6, 5, 3, 3, dtype=torch.bfloat16))]
        weights[0].grad = torch.ones_like(weights[0])
        settings = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
        saved = Adafactor(weights, **settings, flatten_convolutions=before)
        saved.step()
        resumed = Adafactor(weights, **settings, flatten_convolutions=not before)
        kept, count = weights[0].detach().clone(), dict(saved.state[weights[0]])
        try:
            ChunkedSteps(with_triton=True).step(weights, resumed.param_groups[0], {weights[0]: count}, None, None)
        except UserError as error:
            assert "flatten_convolutions" in str(error)
        else:
            raise AssertionError("another flatten_convolutions was accepted")
        assert torch.equal(weights[0], kept)


class InFloat64:
    """Adafactor's step of one weight in float64, from the paper (Shazeer and Stern 2018, algorithms 4 and 5)."""

    def __init__(self, shape, *, flatten):
        self.shape = (shape[0], math.prod(shape[1:])) if flatten and len(shape) > 2 else tuple(shape)
        self.means = [torch.zeros(()).double() for _ in range(min(len(shape), 2))]

    def stepped(self, weight, gradient, step, group):
        """Return the weight after a step, before it is rounded."""
        weight, gradient = (each.detach().double().reshape(self.shape) for each in (weight, gradient))
        beta2, squares = 1 - step ** group["decay_rate"], gradient.square() + group["eps"][0]
        found = [squares] if len(self.means) == 1 else [squares.mean(-1), squares.mean(-2)]
        self.means = [beta2 * mean + (1 - beta2) * each for mean, each in zip(self.means, found, strict=True)]
        if len(self.means) == 1:
            variance = self.means[0]
        else:
            rows, columns = self.means
            variance = (rows / rows.mean(-1, keepdim=True)).unsqueeze(-1) * columns.unsqueeze(-2)
        update = gradient / variance.sqrt()
        update /= max(1.0, update.square().mean().sqrt().item() / group["clip_threshold"])
        return weight - group["lr"] * group["weight_decay"] * weight - group["lr"] * update


def compare_with_float64(name):
    """The programs' steps against the formulas in float64: within float32's rounding, and then that of the weights."""
    dtype, rounding, flatten = CASES[name]
    weights = [Parameter(draw(shape, 0, dtype, exact=False)) for shape in SHAPES]
    settings = {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "weight_decay": 0.01}
    optimizer = Adafactor(weights, **settings, flatten_convolutions=flatten, clip_threshold=0.7)
    rounder = None if rounding is None else Rounder(rounding, weights, seed=3)
    exact = [InFloat64(shape, flatten=flatten) for shape in SHAPES]
    steps, group, state = ChunkedSteps(with_triton=True), optimizer.param_groups[0], optimizer.state
    for step in range(1, 4):
        if rounder is not None:
            rounder.start(step)
        before = [weight.detach().double() + state[weight].get(RESIDUAL, 0.0) for weight in weights]
        for index, weight in enumerate(weights):
            weight.grad = draw(weight.shape, 100 * step + index, dtype, exact=False)
        steps.step(weights, group, state, rounder, None)
        for weight, held, each in zip(weights, before, exact, strict=True):
            expected = each.stepped(held, weight.grad, step, group).reshape(weight.shape)
            found = weight.detach().double() + state[weight].get(RESIDUAL, 0.0)
            assert ((found - expected).abs() <= 1e-7 + expected.abs() * ROUNDED[rounding]).all(), (name, weight.shape)
    for weight, each in zip(weights, exact, strict=True):
        means = [state[weight][key] for key in MEANS if key in state[weight]]
        for found, expected in zip(means, each.means, strict=True):
            torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=2e-6, atol=0)


def try_the_programs_out():
    """The trial before a run passes, and notices a program that does nothing, or cannot be compiled."""
    device, launch = torch.device("cpu"), triton_launches.launch
    assert why_not(device) is None

    def without(name):
        return lambda program, *arguments, **named: program.__name__ == name or launch(program, *arguments, **named)

    for name, said in (("round_all", "rounds to other numbers"), ("apply", "update weights to other numbers")):
        with patch.object(triton_launches, "launch", without(name)):
            assert said in why_not(device)
    with patch.object(triton_launches, "launch", side_effect=RuntimeError("Failed to find C compiler.")):
        assert why_not(device) == "RuntimeError: Failed to find C compiler."
    print("the trial notices what is wrong", flush=True)


try_the_programs_out()
compare_rounding()
compare_rounding_together()
require_the_same_flattening()
for exact in (True, False):
    for name in sys.argv[1:] or CASES:
        compare(name, exact=exact)
        print(f"{name}, {'exact sums' if exact else 'any sums'}: the same", flush=True)
for name in sys.argv[1:] or CASES:
    compare_with_float64(name)
    print(f"{name}: as in float64", flush=True)
