"""What cannot work between the optimizer, its schedule and moving averages."""

from collections.abc import Iterator

from library.config.options import problems_of
from library.optim.ema_options import EmaOptions
from library.optim.known_optimizers import ADAFACTOR
from library.optim.options import ADAFACTOR_RECIPE, OptimizerOptions, complaints
from library.optim.schedule_options import ScheduleOptions


def optimizer_conflicts(optimizer: OptimizerOptions, schedule: ScheduleOptions, num_steps: int | None) -> Iterator[str]:
    """Yield what cannot work in a run of `num_steps` (None: not known yet), one sentence each."""
    if problems_of(optimizer) or problems_of(schedule):
        return  # which the classes report
    is_constant = schedule.lr_scheduler == "constant" and not schedule.lr_scheduler_type
    if optimizer.is_schedule_free and not is_constant:
        yield (
            f"--optimizer_type {optimizer.optimizer_type} replaces the schedule: set --lr_scheduler=constant; "
            "it warms up with --optimizer_args warmup_steps=100."
        )
    if optimizer.finds_its_rate and not schedule.is_adafactor:
        yield (
            "Adafactor with relative_step=True sets the learning rate by itself, against --learning_rate. Pass "
            f"{ADAFACTOR_RECIPE}, or let it, with --lr_scheduler=adafactor."
        )
    if schedule.is_adafactor and not optimizer.finds_its_rate:
        yield (
            f"--lr_scheduler=adafactor reports the rates that --optimizer_type={ADAFACTOR} finds with "
            "relative_step=True, its default. Choose another schedule, or that optimizer without relative_step=False."
        )
    ignored = optimizer.ignored_rates() if optimizer.finds_its_rate else []
    if ignored:
        yield (
            f"{' and '.join(ignored)} would be ignored: Adafactor with relative_step=True finds the rates. Leave it "
            "out, or set it to 0 to freeze that part."
        )
    yield from schedule.problems_in_run(num_steps, optimizer.learning_rate)


def schedule_refusals(optimizer: OptimizerOptions, schedule: ScheduleOptions, num_steps: int | None) -> Iterator[str]:
    """Yield what a schedule by its class refuses; it is stepped through the run, if `num_steps` are known."""
    if not schedule.lr_scheduler_type:
        return
    from library.optim.lr_curves import rates_over_run

    def run_through() -> None:
        rates = {"trained": optimizer.learning_rate}
        rates_over_run(optimizer, schedule, rates, num_steps=num_steps or 1, at=())

    yield from complaints(run_through)


def average_conflicts(averages: EmaOptions, optimizer: OptimizerOptions, *, draws_average: bool) -> Iterator[str]:
    """Yield what cannot work between moving averages, samples and the optimizer, one sentence each."""
    if draws_average and not averages.ema:
        yield "--sample_ema has no effect without --ema; add it."
    if optimizer.is_schedule_free and averages.profiles:
        yield (
            f"--optimizer_type {optimizer.optimizer_type} averages the weights itself, and saves the average: leave "
            "out --ema and --ema_snapshot_every_n_steps."
        )
