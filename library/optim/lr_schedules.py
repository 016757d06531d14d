"""How the learning rate changes over a run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from library.config.errors import UserError
from library.optim.options import ScheduleOptions

POLYNOMIAL_END = 1e-7  # the learning rate at which transformers' polynomial schedule ends


def make_lr_schedule(optimizer: Optimizer, options: ScheduleOptions, num_steps: int) -> LambdaLR:
    """Return the schedule for a run of `num_steps` optimizer steps, to be stepped once after each of them.

    It scales the rate of every parameter group alike. Raise `UserError` if the warm-up is longer than the run, or if
    the polynomial schedule would rise to its end of 1e-7 instead of falling to it.
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
                "Raise the learning rate, or choose another schedule.",
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
            "Set fewer, or a fraction of the steps, such as 0.1.",
        )
    return num_warmup_steps
