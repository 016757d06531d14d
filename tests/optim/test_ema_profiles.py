"""Profiles of moving averages, and any length from two that were kept."""

import numpy as np
import pytest

from library.config.errors import UserError
from library.config.options import parse_options, problems_of
from library.optim.ema_options import EmaOptions
from library.optim.ema_profiles import Combination, Moment, PowerFunction, combination
from library.optim.option_conflicts import average_conflicts
from library.optim.options import OptimizerOptions

NUM_STEPS = 400


def profile(sigma_rel: float, num_steps: int) -> np.ndarray:
    """The weight of each of `NUM_STEPS` steps in an average after `num_steps` of them."""
    power = PowerFunction(sigma_rel).exponent + 1
    steps = np.arange(1, NUM_STEPS + 1)
    return np.where(steps <= num_steps, steps**power - (steps - 1) ** power, 0) / num_steps**power


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_width_of_a_profile_is_the_one_asked_for(sigma_rel: float):
    steps, weights = np.arange(NUM_STEPS) + 0.5, profile(sigma_rel, NUM_STEPS)
    mean = (steps * weights).sum()
    deviation = np.sqrt(((steps - mean) ** 2 * weights).sum())
    assert weights.sum() == pytest.approx(1)
    assert deviation / NUM_STEPS == pytest.approx(sigma_rel, abs=1e-3)


def kept_every(every: int, last: int = NUM_STEPS) -> list[Moment]:
    return [Moment(PowerFunction(width), step) for step in range(every, last + 1, every) for width in (0.05, 0.1)]


def distance(found: Combination, kept: list[Moment], wanted: Moment) -> float:
    """How far the combination is from the profile, relative to it, step by step."""
    target = profile(wanted.profile.sigma_rel, wanted.num_steps)
    combined = sum(
        factor * profile(each.profile.sigma_rel, each.num_steps)
        for factor, each in zip(found.factors, kept, strict=True)
    )
    return float(np.linalg.norm(combined - target) / np.linalg.norm(target))


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2, 0.25])
def test_a_length_that_was_not_kept_is_met_as_closely_as_is_reported(sigma_rel: float):
    kept, wanted = kept_every(20), Moment(PowerFunction(sigma_rel), NUM_STEPS)
    found = combination(kept, wanted)
    assert sum(found.factors) == pytest.approx(1, abs=1e-9)
    assert found.error < 0.07
    assert distance(found, kept, wanted) == pytest.approx(found.error, abs=0.01)
    assert found.error < combination(kept_every(100), wanted).error


def test_an_average_that_was_kept_is_itself():
    kept = kept_every(50)
    found = combination(kept, kept[-1])
    assert found.factors == pytest.approx([0] * (len(kept) - 1) + [1], abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_an_average_of_steps_that_were_random_is_that_of_a_run_which_kept_it():
    weights = np.random.default_rng(0).normal(size=(NUM_STEPS, 1000)).cumsum(axis=0)
    kept, wanted = kept_every(20), Moment(PowerFunction(0.15), NUM_STEPS)
    averages = [profile(each.profile.sigma_rel, each.num_steps) @ weights for each in kept]
    built = sum(factor * each for factor, each in zip(combination(kept, wanted).factors, averages, strict=True))
    exact = profile(0.15, NUM_STEPS) @ weights
    assert np.linalg.norm(built - exact) < 0.01 * np.linalg.norm(weights[-1] - exact)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--ema", "--ema_decay=1.5"), "--ema_decay is 1.5; it must be 1 or less."),
        (("--ema", "--ema_decay=-0.1"), "--ema_decay is -0.1; it must be 0 or more."),
        (("--ema_decay=0.9",), "--ema_decay has no effect without --ema; add it or leave out --ema_decay."),
        (
            ("--ema_every=2",),
            "--ema_every has no effect without --ema or --ema_snapshot_every_n_steps; add one of them.",
        ),
        (("--ema", "--ema_every=0"), "--ema_every is 0; it must be 1 or more."),
        (
            ("--ema", "--ema_sigma_rel", "0.2"),
            "--ema_sigma_rel has no effect without --ema_snapshot_every_n_steps; add it.",
        ),
        (
            ("--ema_snapshot_every_n_steps=9", "--ema_sigma_rel", "0.1", "0.4"),
            "--ema_sigma_rel is 0.4; it must be from 0.005 to 0.28.",
        ),
        (
            ("--ema_snapshot_every_n_steps=9", "--ema_sigma_rel", "0.1", "0.1"),
            "--ema_sigma_rel takes 1 to 8 different lengths, such as 0.05 0.1.",
        ),
    ],
)
def test_each_mistake_is_one_sentence(flags: tuple[str, ...], problem: str):
    with pytest.raises(UserError) as raised:
        parse_options([EmaOptions], list(flags), description="")
    assert str(raised.value).startswith(problem)


def test_what_is_kept_follows_from_the_flags():
    (options,) = parse_options([EmaOptions], ["--ema", "--ema_snapshot_every_n_steps=5"], description="")
    assert problems_of(options) == []
    assert list(options.profiles) == ["ema", "sigma0.050", "sigma0.100"]
    assert EmaOptions().profiles == {}


def test_what_cannot_work_beside_an_average_is_named():
    free = OptimizerOptions(optimizer_type="AdamWScheduleFree")
    [said] = average_conflicts(EmaOptions(ema=True), free, draws_average=True)
    assert said.startswith("--optimizer_type AdamWScheduleFree averages the weights itself")
    [said] = average_conflicts(EmaOptions(), OptimizerOptions(), draws_average=True)
    assert said == "--sample_ema has no effect without --ema; add it."
    assert list(average_conflicts(EmaOptions(ema=True), OptimizerOptions(), draws_average=True)) == []
