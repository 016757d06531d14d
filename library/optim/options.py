"""The flags of the optimizer and its learning rates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from library.config.errors import UserError
from library.config.magnitudes import HIGHEST_NORM, HIGHEST_RATE
from library.config.options import option
from library.optim.arguments import parse_arguments
from library.optim.known_optimizers import ADAFACTOR, PRODIGY_PLUS, SCHEDULE_FREE, kind_of
from library.sdxl.unet_blocks import NUM_UNET_BLOCKS

ADAFACTOR_RECIPE = "--optimizer_args scale_parameter=False relative_step=False warmup_init=False"
STOCHASTIC = "stochastic"
KAHAN = "kahan"
NEAREST = "nearest"
ROUNDINGS = (STOCHASTIC, KAHAN, NEAREST)


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    _argument_group_name: ClassVar[str] = "Optimizer"

    optimizer_type: str = option(
        "",
        "Optimizer, in any case: AdamW (default), AdamW8bit, Adafactor, Lion, Prodigy, Muon, CAME ... "
        "(docs/performance.md lists them), or a class path such as torch.optim.SGD.",
    )
    optimizer_args: list[str] | None = option(
        None, "Arguments of the optimizer, such as weight_decay=0.01 betas=0.9,0.99.", nargs="*"
    )
    learning_rate: float = option(2e-6, "Learning rate. 0 freezes the U-Net.", least=0, most=HIGHEST_RATE)
    learning_rate_te1: float | None = option(
        None,
        "Learning rate of text encoder L with --train_text_encoder. 0 freezes it. Default: --learning_rate.",
        least=0,
        most=HIGHEST_RATE,
    )
    learning_rate_te2: float | None = option(
        None,
        "Learning rate of text encoder G with --train_text_encoder. 0 freezes it. Default: --learning_rate.",
        least=0,
        most=HIGHEST_RATE,
    )
    block_lr: str | None = option(
        None, f"Learning rates of the {NUM_UNET_BLOCKS} U-Net blocks, separated by commas. 0 freezes a block."
    )
    max_grad_norm: float = option(1.0, "Clip gradients to this norm. 0 disables clipping.", least=0, most=HIGHEST_NORM)
    fused_backward_pass: bool = option(
        False,
        "Update each weight within the backward pass and free its gradient: the same weights, much less memory. "
        "Clipping needs a backward pass to compute the norm first; set --max_grad_norm=0 to save that time.",
    )

    offload_optimizer: bool = option(
        False,
        "Keep the optimizer's state in pinned host memory and copy it to the GPU while the backward pass runs: the "
        "same weights, and AdamW fits on 24 GB. Add --fused_backward_pass.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `optimizer_args`, by name. Raise `UserError` for what is none."""
        return parse_arguments("--optimizer_args", self.optimizer_args or [])

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer averages its weights instead of lowering its rate."""
        is_named = self.optimizer_type.lower() in {name.lower() for name in (*SCHEDULE_FREE, PRODIGY_PLUS)}
        return is_named and bool(self.arguments.get("use_schedulefree", True))

    @property
    def finds_its_rate(self) -> bool:
        """Whether this is Adafactor with relative steps, whose rate follows from the step and the size of weights."""
        is_relative = self.optimizer_type.lower() == ADAFACTOR.lower() and self.arguments.get("relative_step", True)
        return bool(is_relative)

    def ignored_rates(self) -> list[str]:
        """Return the flags whose rates Adafactor with relative steps would ignore: all but those that freeze."""
        rates = {"--learning_rate_te1": self.learning_rate_te1, "--learning_rate_te2": self.learning_rate_te2}
        others = [flag for flag, rate in rates.items() if rate not in (None, 0, self.learning_rate)]
        of_blocks = set(parse_block_rates(self.block_lr)) if self.block_lr is not None else set()
        return others + (["--block_lr"] if len(of_blocks - {0.0}) > 1 else [])

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        yield from complaints(kind_of, self.optimizer_type)
        yield from complaints(lambda: self.arguments)
        if self.offload_optimizer and self.optimizer_type.lower().startswith("paged"):
            yield (
                f"--offload_optimizer cannot work with --optimizer_type {self.optimizer_type}, which pages its state "
                "by itself; choose one of the two."
            )
        if self.block_lr is not None:
            yield from complaints(parse_block_rates, self.block_lr)
            if self.learning_rate == 0:
                yield "--learning_rate is 0, which freezes the U-Net; --block_lr has no effect then."

    def heavy_problems(self) -> Iterator[str]:
        """Yield what the optimizer refuses; it is tried on a few numbers."""
        import torch

        from library.optim.optimizer_probe import require_each_alone
        from library.optim.optimizers import make_optimizer, require_every_shape

        group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": self.learning_rate}
        refused = list(complaints(make_optimizer, [group], self))
        refused = refused or list(complaints(require_every_shape, self))
        if not refused and (self.fused_backward_pass or self.offload_optimizer):
            make = partial(make_optimizer, options=self)
            refused = list(complaints(require_each_alone, make, self, torch.device("cpu")))
        yield from refused


def complaints(function: Callable[..., object], *arguments: object) -> Iterator[str]:
    """Yield what `function(*arguments)` complains of in a `UserError`."""
    try:
        function(*arguments)
    except UserError as error:
        yield str(error)


def parse_block_rates(text: str) -> list[float]:
    """Return the learning rates of the 23 U-Net blocks from numbers separated by commas.

    Raise `UserError` for another count and for anything that is not a rate.
    """
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--block_lr: {error}.", "Separate numbers by commas.") from None
    if len(rates) != NUM_UNET_BLOCKS:
        raise UserError(f"--block_lr has {len(rates)} rates.", f"Pass {NUM_UNET_BLOCKS}, one for each U-Net block.")
    if not all(0 <= rate <= HIGHEST_RATE for rate in rates):
        raise UserError(f"--block_lr is {text}.", f"Every rate must be a number from 0 to {HIGHEST_RATE:g}.")
    return rates
