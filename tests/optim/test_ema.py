"""Moving averages: diffusers' numbers, rounding that loses nothing, and weights that come back bit for bit."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from library.optim import ema
from library.optim.ema import MovingAverage
from library.optim.ema_profiles import Decay, PowerFunction, Profile

CPU = torch.device("cpu")


def make(profile: Profile, dtype=torch.float32, weights_dtype=torch.float32, width: int = 50):
    """Weights, and an average that has begun with them."""
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(width, 3).to(weights_dtype)), Parameter(torch.randn(width).to(weights_dtype))]
    average = MovingAverage(weights, profile, dtype, CPU, seed="7/ema")
    average.begin(0)
    return weights, average


def walk(weights: list[Parameter], step: int, size: float = 1.0) -> None:
    """Change the weights as step `step` does."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for each in weights:
            each += size * torch.randn(each.shape, generator=generator)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Decay(0.9999), {"decay": 0.9999}),
        (Decay(0.5), {"decay": 0.5}),
        (Decay(0.9, power=0.75), {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}),
    ],
    ids=["warm-up alone", "short", "power"],
)
def test_an_average_is_that_of_diffusers(ours: Decay, theirs: dict):
    weights, average = make(ours)
    reference = EMAModel(weights, **theirs)
    for step in range(1, 31):
        walk(weights, step)
        average.update(step)
        reference.step(weights)
    for one, other in zip(average.values, reference.shadow_params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_update_for_several_steps_has_the_decay_of_all_of_them():
    for profile in (Decay(0.9), Decay(0.999, power=2 / 3), PowerFunction(0.1)):
        each = 1.0
        for step in range(4, 10):
            each *= profile.kept(step - 1, step)
        assert profile.kept(3, 9) == pytest.approx(each, rel=1e-12)
        assert profile.kept(0, 5) == 0.0


@pytest.mark.parametrize("every", [1, 3])
def test_a_power_function_weighs_each_step_as_it_is_defined(every: int):
    profile, last = PowerFunction(0.15), 12
    weights, average = make(profile)
    expected, power = torch.zeros(50), profile.exponent + 1
    for step in range(1, last + 1):
        walk(weights, step)
        if step % every == 0:
            average.update(step)
            expected += weights[1].detach() * (step**power - (step - every) ** power) / last**power
    torch.testing.assert_close(average.values[1], expected, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_steps_far_smaller_than_its_spacing_are_not_lost():
    weights, narrow = make(Decay(0.99), torch.bfloat16, torch.bfloat16, width=4000)
    _, wide = make(Decay(0.99), torch.float32, torch.bfloat16, width=4000)
    wide._weights = narrow._weights
    begun = weights[1].detach().clone()
    with torch.no_grad():
        weights[1] += 0.25
    for average in (narrow, wide):
        average.begun = average.step = -900  # an old average, whose decay is no longer warmed up
        for step in range(1, 101):
            average.update(step)
    moved = [float((average.values[1].float() - begun.float()).mean()) for average in (narrow, wide)]
    assert moved[0] == pytest.approx(moved[1], rel=0.02)
    assert moved[1] > 0.1


def test_rounding_is_a_function_of_seed_step_and_place():
    runs = []
    for _ in range(2):
        weights, average = make(Decay(0.9), torch.bfloat16, torch.float32)
        for step in range(1, 6):
            walk(weights, step)
            average.update(step)
        runs.append(average.values)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lent_weights_come_back_bit_for_bit_and_so_does_the_average(dtype, weights_dtype, monkeypatch):
    monkeypatch.setattr(ema, "_PIECE", 40)  # in many pieces
    weights, average = make(Decay(0.9), dtype, weights_dtype)
    for step in range(1, 4):
        walk(weights, step)
        average.update(step)
    before = [each.detach().clone() for each in weights]
    kept = [each.clone() for each in average.values]
    with pytest.raises(KeyboardInterrupt), average.lent():
        for one, other in zip(weights, kept, strict=True):
            spacing = torch.finfo(weights_dtype).eps * other.float().abs()
            assert ((one.float() - other.float()).abs() <= spacing / 2).all(), "the nearest of that precision"
        raise KeyboardInterrupt
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(average.values, kept, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_update_is_the_plain_one(dtype, weights_dtype):
    torch.manual_seed(0)
    first, weights = torch.randn(2**18).to(dtype), torch.randn(2**18).to(weights_dtype)
    seed = 5 if dtype == torch.bfloat16 else None
    fast, plain = first.clone(), first.clone()
    ema._blend(fast, weights, 0.125, seed)
    ema._blend.__wrapped__(plain, weights, 0.125, seed)
    if dtype == torch.float32:
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-7)
    else:  # where a float32 differs in its last bit, the carry into bfloat16 may
        assert float((fast != plain).float().mean()) < 1e-3
