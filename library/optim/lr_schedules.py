"""How the learning rate changes over a run."""

import inspect
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.optimization import get_scheduler

from library.config.errors import UserError
from library.optim.adafactor import Adafactor
from library.optim.installed_classes import load_class
from library.optim.schedule_options import STEP_RULES, ScheduleOptions, parse_step_rules

_TYPE = "--lr_scheduler_type"


def make_lr_schedule(optimizer: Optimizer, options: ScheduleOptions, num_steps: int) -> LRScheduler:
    """Return the schedule for a run of `num_steps` optimizer steps, to be stepped once after each of them.

    A schedule that has a name scales the rate of every parameter group alike. Raise `UserError` for what cannot work in
    a run of this length, and for a class that is no schedule.
    """
    if options.lr_scheduler_type:
        return _of_class(optimizer, options)
    learning_rate = optimizer.defaults["lr"]
    for problem in options.problems_in_run(num_steps, learning_rate):
        raise UserError(problem)
    name, arguments = options.kind.name, options.arguments
    warmup = options.warmup(num_steps)
    if options.is_adafactor:
        rate = options.initial_rate
        return AdafactorRates(optimizer, learning_rate if rate is None else rate)
    if name == "piecewise_constant":
        return LambdaLR(optimizer, _pieces(arguments[STEP_RULES]))
    if name == "rex":
        lowest = options.lr_scheduler_min_lr_ratio or 0.0
        return LambdaLR(optimizer, partial(rex, num_warmup_steps=warmup, num_steps=num_steps, lowest=lowest))
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={**_flags_as_arguments(options, num_steps), **arguments},
    )


def _flags_as_arguments(options: ScheduleOptions, num_steps: int) -> dict[str, Any]:
    """Return what the flags of a schedule are to the function of transformers that makes it."""
    waves = options.lr_scheduler_num_cycles / 2
    lowest = options.lr_scheduler_min_lr_ratio
    match options.kind.name:
        case "cosine_with_restarts":
            return {"num_cycles": options.lr_scheduler_num_cycles}
        case "polynomial":
            return {"power": options.lr_scheduler_power}
        case "inverse_sqrt":
            return {"timescale": options.lr_scheduler_timescale}
        case "cosine_with_min_lr":
            return {"num_cycles": waves, "min_lr_rate": lowest}
        case "warmup_stable_decay":
            return {"num_cycles": waves, "num_decay_steps": options.decay(num_steps), "min_lr_ratio": lowest or 0.0}
        case _:
            return {}


def rex(step: int, *, num_warmup_steps: int, num_steps: int, lowest: float) -> float:
    """Return the factor of "reflected exponential" (Chen et al. 2021, https://arxiv.org/abs/2107.04197), equation 5.

    It stays high longer than a cosine and falls steeply at the end, to `lowest`, after a linear warm-up.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    left = max(0.0, 1 - done)
    return lowest + (1 - lowest) * left / (0.5 + 0.5 * left)


def _pieces(rules: str) -> Callable[[int], float]:
    pieces, last = parse_step_rules(rules)
    ends, factors = [end for end, _ in pieces], [*(factor for _, factor in pieces), last]

    def factor(step: int) -> float:
        return factors[bisect_right(ends, step)]

    return factor


class AdafactorRates(LambdaLR):
    """The rates that Adafactor with relative steps finds: this schedule reports them and sets none.

    That of a group is the one of its first parameter in the last step, and `initial_rate` before the first: as
    transformers' AdafactorSchedule. Raise `UserError` for another optimizer.
    """

    def __init__(self, optimizer: Optimizer, initial_rate: float):
        if not isinstance(optimizer, Adafactor):
            raise UserError("--lr_scheduler=adafactor reports the rates of --optimizer_type=Adafactor alone.")
        self._initial_rate = initial_rate
        super().__init__(optimizer, lambda _: 1.0)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group."""
        optimizer = self.optimizer
        assert isinstance(optimizer, Adafactor)
        rates = [optimizer.rate_of_last_step(group) for group in optimizer.param_groups]
        return [self._initial_rate if rate is None else rate for rate in rates]


# -- classes by their path --------------------------------------------------------------------------------------------


def _of_class(optimizer: Optimizer, options: ScheduleOptions) -> LRScheduler:
    path = options.lr_scheduler_type
    path = path if "." in path else f"torch.optim.lr_scheduler.{path}"  # as the reference trainer reads it
    found = load_class(_TYPE, path, LRScheduler, "a learning-rate schedule")
    needed = [name for name, each in inspect.signature(found.step).parameters.items() if each.default is each.empty]
    if needed[1:]:  # beside self
        raise UserError(
            f"{_TYPE} {path} needs {', '.join(needed[1:])} in every step, which there is none of.",
            "Choose a schedule that follows from the number of steps.",
        )
    try:
        made = found(optimizer, **options.arguments)
        setattr(made, _CHOSEN, options.arguments)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{_TYPE} {path} refuses its arguments: {reason}.",
            f"Correct --lr_scheduler_args, or choose another {_TYPE}.",
        ) from error
    return made


# -- resuming ---------------------------------------------------------------------------------------------------------

_CLASS, _ARGUMENTS, _STATE = "class", "arguments", "state"


def saved_schedule(schedule: LRScheduler) -> dict[str, Any]:
    """Return the state of a schedule, to be restored by `restore_schedule`."""
    if isinstance(schedule, LambdaLR):
        return schedule.state_dict()
    return {_CLASS: type(schedule).__name__, _ARGUMENTS: _arguments_of(schedule), _STATE: schedule.state_dict()}


def restore_schedule(schedule: LRScheduler, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Set the schedule to the saved step, and the rates of the parameter groups.

    A schedule that has a name continues under the current options: what they make of that step. One by its class cannot
    be changed on the way. Raise `UserError` if it was.
    """
    if isinstance(schedule, LambdaLR) and _CLASS not in saved:
        schedule.load_state_dict(saved)
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        is_reported = isinstance(schedule, AdafactorRates)
        rates = saved["_last_lr"] if is_reported else rates
    else:
        _require_same_class(schedule, saved)
        schedule.load_state_dict(saved[_STATE])
        for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
            group["initial_lr"] = base
        rates = schedule.get_last_lr()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _require_same_class(schedule: LRScheduler, saved: dict[str, Any]) -> None:
    then = saved.get(_CLASS)
    now = None if isinstance(schedule, LambdaLR) else type(schedule).__name__
    if then != now:
        was = f"{_TYPE} {then}" if then is not None else "a schedule of --lr_scheduler"
        raise UserError(f"the state was saved under {was}.", f"Pass the same --lr_scheduler or {_TYPE}.")
    if saved[_ARGUMENTS] != _arguments_of(schedule) or saved[_STATE]["base_lrs"] != schedule.base_lrs:
        raise UserError(
            f"the state was saved under {_TYPE} {then} with another learning rate or other arguments.",
            "Pass the same --learning_rate and --lr_scheduler_args: it cannot be changed on the way.",
        )


def _arguments_of(schedule: LRScheduler) -> dict[str, Any]:
    return dict(getattr(schedule, _CHOSEN))


_CHOSEN = "_chosen_arguments"
