"""The learning rates of a run before it starts, found by stepping its schedule over a few numbers."""

import io
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.config.errors import UserError
from library.optim.chunked_adafactor import relative_step_size
from library.optim.lr_schedules import AdafactorRates, make_lr_schedule, saved_schedule
from library.optim.optimizers import make_optimizer
from library.optim.options import OptimizerOptions
from library.optim.schedule_options import ScheduleOptions


def rates_over_run(
    optimizer_options: OptimizerOptions,
    schedule_options: ScheduleOptions,
    parts: Mapping[str, float],
    *,
    num_steps: int,
    at: Sequence[int],
) -> dict[str, list[float]]:
    """Return the rates of each part of the model at the steps `at` (from 0, rising) of a run.

    `parts` has the learning rate of each. For Adafactor with relative steps it is the step relative to the size of the
    weights, which are not known here. Raise `UserError` as `make_lr_schedule`, and for a schedule that cannot last for
    the run: one that raises, leads to a rate that is none, or cannot be saved.
    """
    groups = [{"name": name, "params": [Parameter(torch.zeros(2, 2))], "lr": rate} for name, rate in parts.items()]
    optimizer = make_optimizer(groups, optimizer_options)
    schedule = make_lr_schedule(optimizer, schedule_options, num_steps)
    if isinstance(schedule, AdafactorRates):
        sizes = [relative_step_size(optimizer.param_groups[0], step + 1) for step in at]
        return dict.fromkeys(parts, sizes)
    if isinstance(schedule, LambdaLR):
        return {
            name: [float(base) * factor(step) for step in at]
            for name, base, factor in zip(parts, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        }
    _require_savable(schedule, schedule_options)
    course = _stepped(schedule, optimizer, schedule_options, num_steps, set(at))
    return {name: [rates[place] for rates in course] for place, name in enumerate(parts)}


def _stepped(
    schedule: LRScheduler, optimizer: Optimizer, options: ScheduleOptions, num_steps: int, at: set[int]
) -> list[list[float]]:
    """Return the rates of the groups at the steps `at`, stepping the schedule as training does."""
    course = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that is stepped without its optimizer
        for step in range(num_steps + 1):
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            _require_rates(rates, step, options)
            if step in at:
                course.append(rates)
            if step < num_steps:
                _step(schedule, step, num_steps, options)
    return course


def _step(schedule: LRScheduler, step: int, num_steps: int, options: ScheduleOptions) -> None:
    try:
        schedule.step()
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--lr_scheduler_type {options.lr_scheduler_type} ends after step {step + 1} of {num_steps}: {reason}.",
            "Correct --lr_scheduler_args.",
        ) from error


def _require_rates(rates: Sequence[float], step: int, options: ScheduleOptions) -> None:
    for rate in rates:
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(
                f"--lr_scheduler_type {options.lr_scheduler_type} leads to the learning rate {rate} in step {step}.",
                "Correct --lr_scheduler_args.",
            )


def _require_savable(schedule: LRScheduler, options: ScheduleOptions) -> None:
    """Raise `UserError` unless the schedule's state can be written, and read without running code."""
    try:
        file = io.BytesIO()
        torch.save(saved_schedule(schedule), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--lr_scheduler_type {options.lr_scheduler_type} has a state that cannot be saved: "
            f"{str(error).partition(chr(10))[0]}.",
            "Choose another schedule.",
        ) from error
