"""Learning rates over a run, as the reference trainer set them."""

import json
from pathlib import Path

import pytest
import torch

from library.config.errors import UserError
from library.config.options import problems_of
from library.optim.lr_schedules import make_lr_schedule
from library.optim.options import SCHEDULES, ScheduleOptions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedules.json").read_text(encoding="utf-8"))
NUM_STEPS = 100


def options_of(name: str) -> ScheduleOptions:
    flags = dict(flag.removeprefix("--").split("=") for flag in GOLDEN[name]["flags"])
    return ScheduleOptions(
        lr_scheduler=name,
        lr_warmup_steps=float(flags.get("lr_warmup_steps", 0)),
        lr_scheduler_num_cycles=int(flags.get("lr_scheduler_num_cycles", 1)),
        lr_scheduler_power=float(flags.get("lr_scheduler_power", 1)),
    )


def rates_over_a_run(options: ScheduleOptions, learning_rate: float = 1e-5) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = make_lr_schedule(optimizer, options, NUM_STEPS)
    rates = []
    for _ in range(NUM_STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", GOLDEN)
def test_the_rate_of_every_step_equals_the_reference(name: str):
    # 1e-12: the same formula in double precision, whose order of operations may differ between versions.
    assert rates_over_a_run(options_of(name)) == pytest.approx(GOLDEN[name]["lr_used_at_step_0_to_100"], rel=1e-12)


def test_every_schedule_on_offer_is_checked_against_the_reference():
    assert set(SCHEDULES) == set(GOLDEN)


def test_a_warmup_below_one_is_a_share_of_the_steps():
    share = ScheduleOptions("constant_with_warmup", lr_warmup_steps=0.1)
    assert rates_over_a_run(share) == rates_over_a_run(options_of("constant_with_warmup"))


def test_every_parameter_group_keeps_its_share_of_the_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-5, 1e-6)]
    optimizer = torch.optim.SGD(groups, lr=1e-5)
    schedule = make_lr_schedule(optimizer, ScheduleOptions("linear", lr_warmup_steps=10), NUM_STEPS)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-6, 5e-7])


@pytest.mark.parametrize(
    ("options", "learning_rate", "expected"),
    [
        (ScheduleOptions("linear", lr_warmup_steps=101), 1e-5, "--lr_warmup_steps is 101, but the run has 100 steps"),
        (ScheduleOptions("polynomial"), 1e-7, "--learning_rate is 1e-07"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(options: ScheduleOptions, learning_rate: float, expected: str):
    with pytest.raises(UserError, match=expected):
        rates_over_a_run(options, learning_rate)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ScheduleOptions("sine"), "must be one of constant, constant_with_warmup, linear"),
        (ScheduleOptions("linear", lr_warmup_steps=1.5), "--lr_warmup_steps is 1.5"),
        (ScheduleOptions("linear", lr_warmup_steps=-1), "--lr_warmup_steps is -1"),
        (ScheduleOptions("linear", lr_warmup_steps=float("nan")), "--lr_warmup_steps is nan"),
        (ScheduleOptions("constant", lr_warmup_steps=10), "use --lr_scheduler=constant_with_warmup"),
        (ScheduleOptions("linear", lr_scheduler_num_cycles=3), "only on cosine_with_restarts"),
        (ScheduleOptions("cosine_with_restarts", lr_scheduler_num_cycles=0), "must be 1 or more"),
        (ScheduleOptions("linear", lr_scheduler_power=2), "only on polynomial"),
        (ScheduleOptions("polynomial", lr_scheduler_power=0), "must be 0.01 or more"),
    ],
)
def test_values_that_cannot_work_are_named(options: ScheduleOptions, expected: str):
    [problem] = problems_of(options)
    assert expected in problem


@pytest.mark.parametrize("name", GOLDEN)
def test_sound_values_have_no_problems(name: str):
    assert list(options_of(name).problems()) == []
