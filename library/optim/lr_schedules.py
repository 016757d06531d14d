"""How the learning rate changes over a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from library.config.errors import UserError
from library.config.options import option

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # the learning rate at which transformers' polynomial schedule ends


@dataclass(frozen=True)
class ScheduleOptions:
    """The course of the learning rate."""

    _argument_group_name: ClassVar[str] = "Learning rate schedule"

    lr_scheduler: str = option("constant", f"How the learning rate changes: {', '.join(SCHEDULES)}.")
    lr_warmup_steps: float = option(0.0, "Steps over which it rises from 0; a number below 1 is a share of all steps.")
    lr_scheduler_num_cycles: int = option(1, "How often cosine_with_restarts falls to 0.")
    lr_scheduler_power: float = option(1.0, "Power of the polynomial schedule.")

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, one sentence each."""
        name = self.lr_scheduler
        if name not in SCHEDULES:
            yield f"--lr_scheduler is '{name}'; it must be one of {', '.join(SCHEDULES)}."
            return
        is_share = 0 <= self.lr_warmup_steps < 1
        if not is_share and not (self.lr_warmup_steps >= 1 and float(self.lr_warmup_steps).is_integer()):
            yield f"--lr_warmup_steps is {self.lr_warmup_steps}; it must be a whole number, or a share from 0 to 1."
        if self.lr_warmup_steps and name == "constant":
            yield "--lr_warmup_steps has no effect on a constant rate; use --lr_scheduler=constant_with_warmup."
        if self.lr_scheduler_num_cycles < 1:
            yield f"--lr_scheduler_num_cycles is {self.lr_scheduler_num_cycles}; it must be 1 or more."
        if self.lr_scheduler_num_cycles != 1 and name != "cosine_with_restarts":
            yield f"--lr_scheduler_num_cycles has no effect on {name}; only on cosine_with_restarts."
        if not self.lr_scheduler_power > 0:
            yield f"--lr_scheduler_power is {self.lr_scheduler_power}; it must be above 0."
        if self.lr_scheduler_power != 1 and name != "polynomial":
            yield f"--lr_scheduler_power has no effect on {name}; only on polynomial."


def make_lr_schedule(optimizer: Optimizer, options: ScheduleOptions, num_steps: int) -> LambdaLR:
    """The schedule for a run of `num_steps` optimizer steps, to be stepped once after each of them.

    It scales the rate of every parameter group alike. Raises `UserError` where the warm-up is longer than the run, or
    where the polynomial schedule would rise to its end of 1e-7 instead of falling to it.
    """
    num_warmup_steps = _num_warmup_steps(options.lr_warmup_steps, num_steps)
    specific: dict[str, float] = {}
    if options.lr_scheduler == "cosine_with_restarts":
        specific["num_cycles"] = options.lr_scheduler_num_cycles
    elif options.lr_scheduler == "polynomial":
        specific["power"] = options.lr_scheduler_power
        rate = optimizer.defaults["lr"]
        if rate <= POLYNOMIAL_END:
            raise UserError(
                f"--lr_scheduler=polynomial falls to {POLYNOMIAL_END}, but --learning_rate is {rate}.",
                "Give a larger learning rate, or another schedule.",
            )
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=specific,
    )


def _num_warmup_steps(warmup: float, num_steps: int) -> int:
    num_warmup_steps = int(warmup * num_steps) if warmup < 1 else int(warmup)
    if num_warmup_steps > num_steps:
        raise UserError(
            f"--lr_warmup_steps is {num_warmup_steps}, but the run has {num_steps} steps.",
            "Give fewer, or a share of the steps, such as 0.1.",
        )
    return num_warmup_steps
