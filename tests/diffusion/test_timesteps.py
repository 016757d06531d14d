"""Which timesteps are drawn: how often, in which range, and how evenly."""

import math
from itertools import pairwise

import pytest
import torch

from library.config.options import problems_of
from library.data.epoch_order import BatchShape, EpochOrder
from library.diffusion.objective import Objective
from library.diffusion.options import LOGIT_NORMAL, SHIFT, SIGMOID, TimestepOptions
from library.diffusion.timesteps import draw_timesteps
from library.sdxl.prediction import FLOW, Prediction

NARROW = {"min_timestep": 100, "max_timestep": 400}
SAMPLINGS = {
    "uniform": {},
    "sigmoid": {"timestep_sampling": SIGMOID, "sigmoid_scale": 0.5},
    "logit_normal": {"timestep_sampling": LOGIT_NORMAL, "logit_mean": -1.0, "logit_std": 1.5},
    "shift": {"timestep_sampling": SHIFT, "sigmoid_scale": 1.2, "discrete_flow_shift": 2.0},
}
NUM = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_formula(name: str) -> torch.Tensor:
    """Draws as kohya's trainers write them, in float64, as fractions."""
    normal = torch.randn(NUM, generator=seeded(1), dtype=torch.float64)
    match name:
        case "uniform":
            return torch.rand(NUM, generator=seeded(1), dtype=torch.float64)
        case "sigmoid":
            return torch.sigmoid(0.5 * normal)
        case "logit_normal":
            return torch.sigmoid(-1.0 + 1.5 * normal)
        case _:
            s = torch.sigmoid(1.2 * normal)
            return 2.0 * s / (1 + (2.0 - 1) * s)


def test_timesteps_stay_in_their_range_and_reach_both_ends():
    options = TimestepOptions(min_timestep=10, max_timestep=14)
    drawn = draw_timesteps(1000, options, [seeded()], "cpu")
    assert set(drawn.tolist()) == {10, 11, 12, 13}


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_sampling_is_distributed_as_its_formula(name: str, continuous: bool, stratified: bool):
    options = TimestepOptions(**SAMPLINGS[name], stratified_timesteps=stratified)
    drawn = draw_timesteps(NUM, options, [seeded()], "cpu", continuous=continuous)
    assert drawn.dtype == (torch.float32 if continuous else torch.int64)
    assert drawn.min() >= 0 and drawn.max() < 1000
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    found = (drawn.double() + (0 if continuous else 0.5)).quantile(quantiles) / 1000
    # The Kolmogorov distance of two samples of this size exceeds 1.63 sqrt(2 / NUM) = 0.016 once in a hundred.
    expected = by_formula(name)
    shares = torch.stack([(expected <= each).double().mean() for each in found])
    assert (shares - quantiles).abs().max() < 0.016


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_range_cuts_each_distribution_off_and_leaves_its_shape(name: str, continuous: bool):
    drawn = draw_timesteps(NUM, TimestepOptions(**SAMPLINGS[name], **NARROW), [seeded()], "cpu", continuous=continuous)
    assert drawn.min() >= 100 and drawn.max() < 400
    expected = by_formula(name) * 1000
    expected = expected[(expected >= 100) & (expected < 400)]
    assert abs((drawn < 200).double().mean() - (expected < 200).double().mean()) < 0.03


@pytest.mark.parametrize("name", SAMPLINGS)
def test_stratified_draws_share_the_distribution_out(name: str):
    options = TimestepOptions(**SAMPLINGS[name], stratified_timesteps=True)
    plain = TimestepOptions(**SAMPLINGS[name])
    drawn = draw_timesteps(10, options, [seeded()], "cpu", continuous=True).double().sort().values
    # Each of ten lies between its neighbours' deciles.
    many = draw_timesteps(NUM, plain, [seeded(1)], "cpu", continuous=True).double()
    deciles = many.quantile(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert all(low - 15 <= each <= high + 15 for each, (low, high) in zip(drawn, pairwise(deciles), strict=True))
    means = torch.stack(
        [draw_timesteps(8, options, [seeded(seed)], "cpu", continuous=True).mean() for seed in range(300)]
    )
    plain_means = torch.stack(
        [draw_timesteps(8, plain, [seeded(seed)], "cpu", continuous=True).mean() for seed in range(300)]
    )
    assert means.std() < 0.5 * plain_means.std()
    assert abs(means.mean() - plain_means.mean()) < 4 * plain_means.std() / math.sqrt(300)


def test_the_images_of_a_step_share_the_strata_however_it_is_split():
    """Two processes with two micro-batches each: together every stratum once."""
    options = TimestepOptions(stratified_timesteps=True)
    drawn, totals, seeds = [], set(), set()
    for process in range(2):
        for batch in EpochOrder([0] * 11, BatchShape(3, 2, 2, process), seed=7):
            drawn.append(
                draw_timesteps(len(batch.indices), options, [seeded(len(drawn))], "cpu", strata=tuple(batch.places))
            )
            totals.add(batch.places.total)
            seeds.add(batch.places.seed)
    assert (totals, len(seeds), len(drawn)) == ({11}, 1, 4)
    assert sorted((torch.cat(drawn).double() * 11 / 1000).long().tolist()) == list(range(11))


def test_a_process_left_over_repeats_the_places_of_the_batch_it_repeats():
    [spare] = list(EpochOrder([0] * 2, BatchShape(2, 1, 2, 1), seed=7))
    assert spare.loss_scale == 0
    assert spare.places[:2] == (0, 2)


def test_the_seed_of_the_strata_is_another_in_each_step_and_the_same_in_a_resumed_run():
    order = EpochOrder([0] * 4, BatchShape(1, 2), seed=7)
    seeds = [each.places.seed for each in order]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    order.start_at(0, 1, steps_done=1)
    assert [each.places.seed for each in order] == seeds[2:]


def test_a_flow_trains_fractions_of_timesteps():
    latents = torch.zeros(64, 4, 8, 8)
    noisy = Objective(prediction=Prediction(FLOW)).draw(latents, [seeded()])
    assert noisy.timesteps.dtype == torch.float32
    assert (noisy.timesteps != noisy.timesteps.round()).any()
    scale = noisy.timesteps[:, None, None, None] / 1000
    torch.testing.assert_close(noisy.latents, scale * noisy.noise)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (TimestepOptions(min_timestep=500, max_timestep=500), "--min_timestep 500 and --max_timestep 500"),
        (TimestepOptions(max_timestep=1001), "--max_timestep is 1001; it must be 1000 or less"),
        (TimestepOptions(min_timestep=-1), "--min_timestep is -1"),
        (TimestepOptions(sigmoid_scale=2.0), "--sigmoid_scale has no effect on --timestep_sampling uniform"),
        (TimestepOptions(timestep_sampling=SHIFT, logit_std=2.0), "--logit_std has no effect"),
        (TimestepOptions(timestep_sampling=SIGMOID, discrete_flow_shift=2.0), "it belongs to shift"),
        (TimestepOptions(timestep_sampling=LOGIT_NORMAL, logit_std=0.0), "--logit_std is 0"),
        (
            TimestepOptions(timestep_sampling=SIGMOID, sigmoid_scale=0.1, max_timestep=10),
            "--timestep_sampling sigmoid draws next to nothing between --min_timestep 0 and --max_timestep 10",
        ),
    ],
)
def test_values_that_cannot_work_are_named(options: TimestepOptions, expected: str):
    [problem] = problems_of(options)
    assert expected in problem
