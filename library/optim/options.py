"""The flags of optimizer and learning-rate schedule."""

import importlib
import importlib.util
import inspect
import site
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.config.errors import UserError
from library.config.magnitudes import HIGHEST_NORM, HIGHEST_RATE, MOST_STEPS
from library.config.options import option
from library.sdxl.unet_blocks import NUM_UNET_BLOCKS

if TYPE_CHECKING:
    from torch.optim import Optimizer

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
STOCHASTIC = "stochastic"
KAHAN = "kahan"
NEAREST = "nearest"
ROUNDINGS = (STOCHASTIC, KAHAN, NEAREST)


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer comes from: module, class, package to install, and the arguments that kohya's name implies."""

    name: str
    module: str
    class_name: str
    package: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    one_rate: bool = False  # finds one learning rate by itself, for all parameter groups together

    def load(self) -> "type[Optimizer]":
        """Return the class. Raise `UserError` if its package is not installed, or cannot be imported."""
        from torch.optim import Optimizer

        if self not in OPTIMIZERS:
            require_installed(self.name, self.module)
        try:
            found = getattr(importlib.import_module(self.module), self.class_name)
        except AttributeError as error:
            raise UserError(f"--optimizer_type {self.name}: {error}.", "Check the spelling of the class.") from error
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything, or end the process
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            known = self in OPTIMIZERS and isinstance(error, ImportError)
            raise UserError(
                f"--optimizer_type {self.name} needs '{self.package}', which cannot be imported ({reason}).",
                f"Run: python -m pip install {self.package}" if known else "Choose another --optimizer_type.",
            ) from error
        if not (inspect.isclass(found) and issubclass(found, Optimizer)):
            raise UserError(
                f"--optimizer_type {self.name} is not an optimizer.", "Name a subclass of torch.optim.Optimizer."
            )
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            message = f"--optimizer_type {self.name} computes the loss several times in a step, which is not supported."
            raise UserError(message, "Choose an optimizer whose step() needs no closure.")
        return found


def require_installed(name: str, module: str) -> None:
    """Raise `UserError` unless `module` belongs to an installed package: a name must not run a file of this folder."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    folders = [Path(each).resolve() for each in (*sites, site.getusersitepackages())]
    origins = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    found = [Path(origin).resolve() for origin in origins if origin is not None]
    if any(path.is_relative_to(folder) for path in found for folder in folders):
        return
    where = "is not installed" if not found else f"is '{found[0]}', which is no installed package"
    raise UserError(
        f"--optimizer_type {name}: '{top}' {where}.",
        "Check the spelling. Only classes of installed packages are used.",
    )


NESTEROV = {"momentum": 0.9, "nesterov": True}
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
BITSANDBYTES = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit")
DADAPTATION = ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")

# kohya's names; one line for those of a package that need nothing but their name.
OPTIMIZERS = (
    OptimizerKind("AdamW", "torch.optim", "AdamW", "torch"),
    OptimizerKind("SGDNesterov", "torch.optim", "SGD", "torch", NESTEROV),
    OptimizerKind("Adafactor", "library.optim.adafactor", "Adafactor", "torch"),
    *(OptimizerKind(name, "bitsandbytes.optim", name, "bitsandbytes") for name in BITSANDBYTES),
    OptimizerKind("SGDNesterov8bit", "bitsandbytes.optim", "SGD8bit", "bitsandbytes", NESTEROV),
    OptimizerKind("Lion", "lion_pytorch", "Lion", "lion-pytorch"),
    *(OptimizerKind(name, "schedulefree", name, "schedulefree") for name in SCHEDULE_FREE),
    OptimizerKind("Prodigy", "prodigyopt", "Prodigy", "prodigyopt", one_rate=True),
    *(OptimizerKind(name, "dadaptation", name, "dadaptation", one_rate=True) for name in DADAPTATION),
    OptimizerKind("DAdaptation", "dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", one_rate=True),
    OptimizerKind("DAdaptAdamPreprint", "dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", one_rate=True),
    OptimizerKind("DAdaptAdanIP", "dadaptation.experimental", "DAdaptAdanIP", "dadaptation", one_rate=True),
)


def kind_of(optimizer_type: str) -> OptimizerKind:
    """Return the optimizer of a name, in any case, or of a class path. Raise `UserError` for any other name."""
    by_name = {kind.name.lower(): kind for kind in OPTIMIZERS} | {"": OPTIMIZERS[0]}
    known = by_name.get(optimizer_type.lower())
    if known is not None:
        return known
    module, _, class_name = optimizer_type.rpartition(".")
    if module and class_name:
        return OptimizerKind(optimizer_type, module, class_name, package=module.partition(".")[0])
    nearest = [by_name[name].name for name in get_close_matches(optimizer_type.lower(), by_name, n=3)]
    names = dict.fromkeys([*nearest, *(kind.name for kind in OPTIMIZERS)])
    raise UserError(
        f"--optimizer_type is '{optimizer_type}'.", f"It must be one of {', '.join(names)}, or the path of a class."
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    _argument_group_name: ClassVar[str] = "Optimizer"

    optimizer_type: str = option(
        "",
        "Optimizer, in any case: AdamW (default), AdamW8bit, Adafactor, Lion, Prodigy ... or a class path such as "
        "torch.optim.SGD.",
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

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer averages its weights instead of lowering its rate."""
        return self.optimizer_type.lower() in {name.lower() for name in SCHEDULE_FREE}

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        yield from _complaints(kind_of, self.optimizer_type)
        if self.block_lr is not None:
            yield from _complaints(parse_block_rates, self.block_lr)
            if self.learning_rate == 0:
                yield "--learning_rate is 0, which freezes the U-Net; --block_lr has no effect then."

    def heavy_problems(self) -> Iterator[str]:
        """Yield what the optimizer refuses; it is tried on a few numbers."""
        import torch

        from library.optim.optimizers import make_optimizer, require_every_shape

        group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": self.learning_rate}
        refused = list(_complaints(make_optimizer, [group], self))
        yield from refused or _complaints(require_every_shape, self)


def _complaints(function: Callable[..., object], *arguments: object) -> Iterator[str]:
    try:
        function(*arguments)
    except UserError as error:
        yield str(error)


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate changes over the run."""

    _argument_group_name: ClassVar[str] = "Learning rate schedule"

    lr_scheduler: str = option("constant", f"Learning-rate schedule: {', '.join(SCHEDULES)}.")
    lr_warmup_steps: float = option(
        0.0, "Number of warm-up steps; a number below 1 is a fraction of all steps.", least=0, most=MOST_STEPS
    )
    lr_scheduler_num_cycles: int = option(1, "Number of cycles of cosine_with_restarts.", least=1, most=MOST_STEPS)
    lr_scheduler_power: float = option(1.0, "Power of the polynomial schedule.", least=0.01, most=100)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        name = self.lr_scheduler
        if name not in SCHEDULES:
            yield f"--lr_scheduler is '{name}'; it must be one of {', '.join(SCHEDULES)}."
            return
        if self.lr_warmup_steps >= 1 and not float(self.lr_warmup_steps).is_integer():
            yield f"--lr_warmup_steps is {self.lr_warmup_steps}; it must be a whole number, or a fraction from 0 to 1."
        if self.lr_warmup_steps and name == "constant":
            yield "--lr_warmup_steps has no effect on a constant rate; use --lr_scheduler=constant_with_warmup."
        if self.lr_scheduler_num_cycles != 1 and name != "cosine_with_restarts":
            yield f"--lr_scheduler_num_cycles has no effect on {name}; only on cosine_with_restarts."
        if self.lr_scheduler_power != 1 and name != "polynomial":
            yield f"--lr_scheduler_power has no effect on {name}; only on polynomial."


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
