"""Rounding to bfloat16: unbiased, repeatable, and why it matters."""

import math

import pytest
import torch
from torch.nn import Parameter

from library.optim.options import STOCHASTIC
from library.optim.rounding import Rounder, round_stochastically, stochastically_rounded, with_residual


@pytest.mark.parametrize("value", [1.0 + 1e-5, -1.001, 3.14159, 1e-20, -0.3333, 65000.1, 1.0 - 2**-20])
def test_the_mean_of_many_roundings_is_the_value(value: float):
    number = 2**20
    values = torch.full((number,), value)
    rounded = stochastically_rounded(values, 5)
    lower, upper = sorted({float(each) for each in rounded.unique()})[0], float(rounded.max())
    exact = float(values[0])
    assert lower <= exact <= upper
    assert upper - lower <= 2**-7 * abs(exact), "only its two neighbours"
    # The mean of so many draws of two values deviates by less than five standard errors but once in two million.
    probability = (exact - lower) / (upper - lower)
    error = (upper - lower) * math.sqrt(probability * (1 - probability) / number)
    assert abs(float(rounded.double().mean()) - exact) <= 5 * error


def test_what_bfloat16_can_hold_stays_as_it_is():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, 3.3895313892515355e38, math.inf, -math.inf, math.nan])
    rounded = stochastically_rounded(values, 1)
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, float(rounded[1])) == -1


def test_neighbours_and_seeds_are_rounded_independently():
    # At a fraction of 1/2 each rounding is a fair coin; five standard errors of the share of equal pairs is 0.0035.
    values = torch.full((512, 1024), 1 + 2**-8)
    first, second = (stochastically_rounded(values, number) > 1 for number in (1, 2))
    for one, other in ((first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        assert abs(float((one == other).float().mean()) - 0.5) < 0.0035


def test_the_compiled_kernel_rounds_to_the_same_bits():
    values = torch.randn(2**17 + 3, generator=torch.Generator().manual_seed(0))
    values[:5] = torch.tensor([math.inf, -math.inf, -0.0, 1e-40, 3.4028234663852886e38])
    rounded, expected = round_stochastically(values, -9), stochastically_rounded(values, -9)
    assert torch.equal(rounded.view(torch.int16), expected.view(torch.int16))


def test_each_parameter_step_and_run_has_a_separate_seed_and_a_resumed_run_the_same():
    parameters = [Parameter(torch.zeros(2)) for _ in range(3)]

    def seeds(run_seed: int, steps: range, of: list[Parameter]) -> list[int]:
        rounder = Rounder(STOCHASTIC, of, run_seed)
        found = []
        for step in steps:
            rounder.start(step)
            found += [rounder.seed(each, what) for each in of for what in ("weights", "exp_avg")]
        return found

    from_the_start = seeds(1, range(1, 3), parameters)
    assert len(set(from_the_start + seeds(2, range(1, 3), parameters))) == 24
    resumed = seeds(1, range(2, 3), [Parameter(torch.ones(2)) for _ in range(3)])
    assert resumed == from_the_start[6:]


def test_a_residual_keeps_16_bits_of_the_value():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    rounded, residual = with_residual(values)
    assert torch.equal(rounded, values.bfloat16())
    # 8 bits of mantissa twice, and the sign of the residual is one more.
    assert ((rounded.float() + residual.float() - values).abs() <= 2**-17 * values.abs()).all()
