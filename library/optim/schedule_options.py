"""The flags of the learning-rate schedule, and which schedule reads which of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from library.config.errors import UserError, nearest
from library.config.magnitudes import HIGHEST_RATE, MOST_STEPS
from library.config.options import changed_options, option
from library.config.value_kinds import NumSteps
from library.optim.arguments import parse_arguments
from library.optim.options import complaints

POLYNOMIAL_END = 1e-7
"""The learning rate at which the polynomial schedule ends."""

_NUMBER, _TEXT, _SHAPE = "a number", "a text", "one of 'linear', 'cosine', '1-sqrt'"
_SHAPES = ("linear", "cosine", "1-sqrt")
STEP_RULES = "step_rules"


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule: the flags that shape it, beside the learning rate, and its arguments of `--lr_scheduler_args`."""

    name: str
    flags: tuple[str, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)


WARMUP, DECAY, CYCLES = "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles"
POWER, TIMESCALE, LEAST = "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"
_SHAPING = (WARMUP, DECAY, CYCLES, POWER, TIMESCALE, LEAST)

SCHEDULES = (
    ScheduleKind("constant"),
    ScheduleKind("constant_with_warmup", (WARMUP,)),
    ScheduleKind("linear", (WARMUP,)),
    ScheduleKind("cosine", (WARMUP,), {"num_cycles": _NUMBER}),
    ScheduleKind("cosine_with_restarts", (WARMUP, CYCLES)),
    ScheduleKind("polynomial", (WARMUP, POWER), {"lr_end": _NUMBER}),
    ScheduleKind("inverse_sqrt", (WARMUP, TIMESCALE)),
    ScheduleKind("cosine_with_min_lr", (WARMUP, CYCLES, LEAST), {"min_lr": _NUMBER}),
    ScheduleKind("warmup_stable_decay", (WARMUP, DECAY, CYCLES, LEAST), {"warmup_type": _SHAPE, "decay_type": _SHAPE}),
    ScheduleKind("piecewise_constant", (), {STEP_RULES: _TEXT}),
    ScheduleKind("rex", (WARMUP, LEAST)),
    ScheduleKind("adafactor"),
)
_BY_NAME = {kind.name: kind for kind in SCHEDULES}


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate changes over the run."""

    _argument_group_name: ClassVar[str] = "Learning rate schedule"

    lr_scheduler: str = option("constant", f"Learning-rate schedule: {', '.join(_BY_NAME)}.")
    lr_scheduler_type: str = option(
        "",
        "Schedule by its class, instead of --lr_scheduler: a class of torch.optim.lr_scheduler, such as "
        "CosineAnnealingLR, or the path of one in an installed package.",
    )
    lr_scheduler_args: list[str] | None = option(
        None,
        "Arguments of the schedule, such as T_max=1000 for a class, min_lr=1e-7 for cosine_with_min_lr, "
        "decay_type=linear for warmup_stable_decay, step_rules=1:1000,0.1:2000,0.01 for piecewise_constant.",
        nargs="*",
    )
    lr_warmup_steps: NumSteps = option(
        NumSteps(0),
        "Number of warm-up steps; a number below 1 or a percentage is a fraction of all steps.",
        least=0,
        most=MOST_STEPS,
    )
    lr_decay_steps: NumSteps = option(
        NumSteps(0),
        "Number of steps at the end over which warmup_stable_decay lowers the rate; a number below 1 or a percentage "
        "is a fraction of all steps.",
        least=0,
        most=MOST_STEPS,
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "Number of restarts of cosine_with_restarts; of half waves of cosine_with_min_lr and warmup_stable_decay.",
        least=1,
        most=MOST_STEPS,
    )
    lr_scheduler_power: float = option(1.0, "Power of the polynomial schedule.", least=0.01, most=100)
    lr_scheduler_timescale: int | None = option(
        None,
        "Steps after the warm-up in which inverse_sqrt lowers the rate to 71 %. Default: the warm-up steps, or 10000.",
        least=1,
        most=MOST_STEPS,
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "Lowest rate of cosine_with_min_lr, warmup_stable_decay and rex, as a fraction of the learning rate.",
        least=0,
        most=1,
    )
    plot_schedule: Path | None = option(
        None, "Train nothing: draw the learning rate of each part of the model over the run into this PNG file."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `lr_scheduler_args`, by name. Raise `UserError` for what is none."""
        known = {} if self.lr_scheduler_type else self.kind.arguments
        texts = [name for name, what in known.items() if what != _NUMBER]
        return parse_arguments("--lr_scheduler_args", self.lr_scheduler_args or [], texts=texts)

    @property
    def kind(self) -> ScheduleKind:
        """The schedule that has a name. Raise `UserError` where none has this one."""
        name = self.lr_scheduler.partition(":")[0] if self._has_rate else self.lr_scheduler
        if name not in _BY_NAME:
            hint = f" {nearest(name, _BY_NAME)}".rstrip()
            raise UserError(f"--lr_scheduler is '{name}'; it must be one of {', '.join(_BY_NAME)}.{hint}")
        return _BY_NAME[name]

    @property
    def is_adafactor(self) -> bool:
        """Whether the schedule only reports the rates that Adafactor finds."""
        return not self.lr_scheduler_type and self.lr_scheduler.partition(":")[0] == "adafactor"

    @property
    def initial_rate(self) -> float | None:
        """The rate in "adafactor:1e-5", which is reported before the first step."""
        return float(self.lr_scheduler.partition(":")[2]) if self._has_rate else None

    @property
    def _has_rate(self) -> bool:
        return self.lr_scheduler.startswith("adafactor:")

    def warmup(self, num_steps: int) -> int:
        """Return the number of warm-up steps in a run of `num_steps`."""
        return _as_steps(self.lr_warmup_steps).of(num_steps)

    def decay(self, num_steps: int) -> int:
        """Return the number of steps at the end over which the rate falls, in a run of `num_steps`."""
        return _as_steps(self.lr_decay_steps).of(num_steps)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.plot_schedule is not None and self.plot_schedule.suffix.lower() != ".png":
            yield f"--plot_schedule is '{self.plot_schedule}'; its name must end in .png."
        for flag in (WARMUP, DECAY):
            steps = _as_steps(getattr(self, flag))
            if not steps.is_fraction and not steps.is_integer():
                yield f"--{flag} is {steps}; it must be a whole number, or a fraction from 0 to 1."
        unknown = [] if self.lr_scheduler_type else list(complaints(lambda: self.kind))
        if unknown:
            yield from unknown
            return
        unread = list(complaints(lambda: self.arguments))
        yield from unread
        if self.lr_scheduler_type:
            yield from self._problems_beside_a_class()
        else:
            yield from self._problems_of_flags()
            yield from () if unread else self._problems_of_arguments()

    def _problems_beside_a_class(self) -> Iterator[str]:
        if self.lr_scheduler != "constant":
            yield (
                f"--lr_scheduler={self.lr_scheduler} has no effect beside --lr_scheduler_type; leave one of them out."
            )
        for flag in self._set_flags():
            yield f"--{flag} has no effect on --lr_scheduler_type; use --lr_scheduler_args."

    def _problems_of_flags(self) -> Iterator[str]:
        kind = self.kind
        for flag in self._set_flags():
            if flag in kind.flags:
                continue
            if flag == WARMUP and kind.name == "constant":
                yield "--lr_warmup_steps has no effect on a constant rate; use --lr_scheduler=constant_with_warmup."
            else:
                readers = [each.name for each in SCHEDULES if flag in each.flags]
                yield f"--{flag} has no effect on {kind.name}; only on {', '.join(readers)}."
        if DECAY in kind.flags and not self.lr_decay_steps:
            yield f"--lr_scheduler={kind.name} needs --lr_decay_steps, such as 0.2 for the last fifth of the steps."
        if self._has_rate:
            yield from _problems_of_rate(self.lr_scheduler.partition(":")[2])

    def _problems_of_arguments(self) -> Iterator[str]:
        kind, arguments = self.kind, self.arguments
        for name, value in arguments.items():
            what = kind.arguments.get(name)
            if what is None:
                takes = f"takes {', '.join(kind.arguments)}" if kind.arguments else "takes none"
                yield f"--lr_scheduler_args: {kind.name} does not take {name}; it {takes}."
            elif not _is(what, value):
                yield f"--lr_scheduler_args: {name} is {value!r}; it must be {what}."
        has_ratio = self.lr_scheduler_min_lr_ratio is not None
        if "min_lr" in kind.arguments and has_ratio == ("min_lr" in arguments):
            yield (
                f"--lr_scheduler={kind.name} needs its lowest rate: pass --lr_scheduler_min_lr_ratio=0.1, or "
                "--lr_scheduler_args min_lr=1e-7, and not both."
            )
        if STEP_RULES in kind.arguments:
            if STEP_RULES not in arguments:
                yield f"--lr_scheduler={kind.name} needs --lr_scheduler_args step_rules=1:1000,0.1:2000,0.01."
            else:
                yield from complaints(parse_step_rules, arguments[STEP_RULES])

    def _set_flags(self) -> list[str]:
        return changed_options(self, _SHAPING)

    def problems_in_run(self, num_steps: int | None, learning_rate: float) -> Iterator[str]:
        """Yield what cannot work in a run of `num_steps`, if they are known, at this learning rate."""
        if self.lr_scheduler_type:
            return
        if num_steps is not None:
            yield from self._problems_of_length(num_steps)
        end = {"polynomial": "lr_end", "cosine_with_min_lr": "min_lr"}.get(self.kind.name)
        default_end = POLYNOMIAL_END if self.kind.name == "polynomial" else None
        lowest = self.arguments.get(end, default_end) if end is not None else None
        if lowest is not None and learning_rate <= lowest:
            yield (
                f"--lr_scheduler={self.kind.name} falls to {lowest}, but --learning_rate is {learning_rate}. Raise the "
                "learning rate, or choose another schedule."
            )

    def _problems_of_length(self, num_steps: int) -> Iterator[str]:
        warmup, decay = self.warmup(num_steps), self.decay(num_steps)
        if warmup > num_steps:
            yield (
                f"--lr_warmup_steps is {warmup}, but the run has {num_steps} steps. Set fewer, or a fraction of the "
                "steps, such as 0.1."
            )
        elif warmup + decay > num_steps:
            yield (
                f"--lr_warmup_steps and --lr_decay_steps are {warmup} and {decay}, but the run has {num_steps} steps. "
                "Set fewer, or fractions of the steps, such as 0.1 and 0.2."
            )


def _as_steps(value: float) -> NumSteps:
    return value if isinstance(value, NumSteps) else NumSteps(value)


def _is(what: str, value: Any) -> bool:
    if what == _NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= HIGHEST_RATE
    return isinstance(value, str) and (what == _TEXT or value in _SHAPES)


def _problems_of_rate(text: str) -> Iterator[str]:
    try:
        is_rate = 0 <= float(text) <= HIGHEST_RATE
    except ValueError:
        is_rate = False
    if not is_rate:
        yield f"--lr_scheduler is 'adafactor:{text}'; behind the colon it must be a learning rate, such as 1e-5."


def parse_step_rules(text: str) -> tuple[list[tuple[int, float]], float]:
    """Return the pieces of "1:1000,0.1:2000,0.01" as (step before which it ends, factor), and the last factor.

    The steps are counted from the beginning of the run, as diffusers does. Raise `UserError` for anything else.
    """
    *pieces, last = text.split(",")
    try:
        factors = [(int(end), float(factor)) for factor, _, end in (piece.partition(":") for piece in pieces)]
        last_factor = float(last)
        ends = [end for end, _ in factors]
        is_sound = all(0 <= factor <= HIGHEST_RATE for factor in (*(each for _, each in factors), last_factor))
        is_sound = is_sound and ends == sorted(set(ends)) and all(end > 0 for end in ends)
    except ValueError:
        is_sound = False
    if not is_sound:
        raise UserError(
            f"--lr_scheduler_args: step_rules is '{text}'.",
            "Write factor:step pairs, with rising steps counted from the beginning, and the last factor alone: "
            "step_rules=1:1000,0.1:2000,0.01.",
        )
    return factors, last_factor
