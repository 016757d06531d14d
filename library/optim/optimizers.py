"""Which parameters are trained at which rate, and by which optimizer."""

import ast
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from library.config.errors import UserError
from library.config.options import option
from library.sdxl.unet_blocks import NUM_UNET_BLOCKS, unet_block_index

ADAFACTOR_RECIPE = "--optimizer_args scale_parameter=False relative_step=False warmup_init=False"


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    _argument_group_name: ClassVar[str] = "Optimizer"

    optimizer_type: str = option(
        "",
        "Optimizer, in any case: AdamW (where none is given), AdamW8bit, Adafactor, Lion, Prodigy ... or a.class.Path.",
    )
    optimizer_args: list[str] | None = option(  # makes a field, as the other calls of it do
        None, "Arguments of the optimizer, as weight_decay=0.01 betas=0.9,0.99.", nargs="*"
    )
    learning_rate: float = option(2e-6, "Learning rate; 0 leaves the U-Net as it is.")
    learning_rate_te1: float | None = option(
        None,
        "Learning rate of text encoder L, if it is trained (--learning_rate where not given; 0 leaves it as it is).",
    )
    learning_rate_te2: float | None = option(
        None,
        "Learning rate of text encoder G, if it is trained (--learning_rate where not given; 0 leaves it as it is).",
    )
    block_lr: str | None = option(
        None, f"Learning rates of the {NUM_UNET_BLOCKS} U-Net blocks, with commas; 0 leaves a block as it is."
    )
    max_grad_norm: float = option(1.0, "Gradients of a larger norm are scaled down to it; 0 lets every gradient pass.")
    fused_backward_pass: bool = option(
        False,
        "Step each weight in the backward pass and free its gradient: the same weights for far less memory. "
        "With --max_grad_norm a backward pass that measures comes first; set it to 0 to spare that time.",
    )

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer averages its weights instead of lowering its rate."""
        return self.optimizer_type.lower() in {name.lower() for name in SCHEDULE_FREE}

    def problems(self) -> Iterator[str]:
        """What is wrong with these values, one sentence each; the optimizer is made once, on a single number."""
        names = ("learning_rate", "learning_rate_te1", "learning_rate_te2", "max_grad_norm")
        numbers = {name: getattr(self, name) for name in names}
        wrong = {name: value for name, value in numbers.items() if value is not None and not 0 <= value < math.inf}
        for name, value in wrong.items():
            yield f"--{name} is {value}; it must be a number of 0 or more."
        if self.block_lr is not None:
            yield from _complaints(parse_block_rates, self.block_lr)
            if self.learning_rate == 0:
                yield "--learning_rate is 0, which leaves the U-Net as it is; --block_lr has no effect then."
        if not wrong:
            group = {"params": [Parameter(torch.zeros(1))], "lr": self.learning_rate}
            yield from _complaints(make_optimizer, [group], self)


def _complaints(function: Callable[..., object], *arguments: object) -> Iterator[str]:
    try:
        function(*arguments)
    except UserError as error:
        yield str(error)


# -- parameters -------------------------------------------------------------------------------------------------------


def make_parameter_groups(
    options: OptimizerOptions,
    unet: Iterable[tuple[str, Parameter]],
    text_encoder_l: Iterable[Parameter] = (),
    text_encoder_g: Iterable[Parameter] = (),
) -> list[dict[str, Any]]:
    """Parameter groups `{"name", "params", "lr"}` for a torch optimizer: "unet", "text_encoder_l", "text_encoder_g".

    `unet` gives single-file names without `model.diffusion_model.` (read only for `block_lr`, where the groups are
    "unet block 0" to "unet block 22"). Pass a text encoder's parameters only where it is to be trained. What has a
    rate of 0 gets no group and `requires_grad` False; all else gets `requires_grad` True. Raises `UserError` where
    nothing is left to train.
    """
    parts = _unet_parts(unet, options) | {
        "text_encoder_l": (list(text_encoder_l), _rate_or(options.learning_rate_te1, options.learning_rate)),
        "text_encoder_g": (list(text_encoder_g), _rate_or(options.learning_rate_te2, options.learning_rate)),
    }
    groups = []
    for name, (parameters, rate) in parts.items():
        for parameter in parameters:
            parameter.requires_grad_(rate != 0)
        if parameters and rate != 0:
            groups.append({"name": name, "params": parameters, "lr": rate})
    if not groups:
        raise UserError("every learning rate is 0: there is nothing to train.", "Set --learning_rate, such as 1e-5.")
    return groups


def parse_block_rates(text: str) -> list[float]:
    """The learning rates of the 23 U-Net blocks, from numbers with commas.

    Raises `UserError` for another count and for anything that is no rate.
    """
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--block_lr: {error}.", "Give numbers with commas between them.") from None
    if len(rates) != NUM_UNET_BLOCKS:
        raise UserError(f"--block_lr has {len(rates)} rates.", f"Give {NUM_UNET_BLOCKS}, one for each U-Net block.")
    if not all(0 <= rate < math.inf for rate in rates):
        raise UserError(f"--block_lr is {text}.", "Every rate must be a number of 0 or more.")
    return rates


def _unet_parts(
    unet: Iterable[tuple[str, Parameter]], options: OptimizerOptions
) -> dict[str, tuple[list[Parameter], float]]:
    """Name to parameters and rate: the U-Net as one part, or a part for each block."""
    if options.block_lr is None:
        return {"unet": ([parameter for _, parameter in unet], options.learning_rate)}
    rates = parse_block_rates(options.block_lr)
    blocks: list[list[Parameter]] = [[] for _ in rates]
    for name, parameter in unet:
        blocks[unet_block_index(name)].append(parameter)
    return {f"unet block {i}": part for i, part in enumerate(zip(blocks, rates, strict=True))}


def _rate_or(rate: float | None, default: float) -> float:
    return default if rate is None else rate


# -- optimizers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer is found: module, class, package to install, and the arguments that kohya's name implies."""

    name: str
    module: str
    class_name: str
    package: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    one_rate: bool = False  # finds the step size by itself, and so for all parameter groups together

    def load(self) -> type[Optimizer]:
        """The class; raises `UserError` with the command to run where its package is not installed."""
        try:
            found = getattr(importlib.import_module(self.module), self.class_name)
        except ImportError as error:
            remedy = f"Run: python -m pip install {self.package}"
            raise UserError(f"--optimizer_type {self.name} needs '{self.package}': {error}.", remedy) from error
        except AttributeError as error:
            raise UserError(f"--optimizer_type {self.name}: {error}.", "Check the spelling of the class.") from error
        if not (inspect.isclass(found) and issubclass(found, Optimizer)):
            raise UserError(f"--optimizer_type {self.name} is no optimizer.", "Name a subclass of torch's Optimizer.")
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            message = f"--optimizer_type {self.name} computes the loss several times in a step, which is not offered."
            raise UserError(message, "Name an optimizer whose step() can be called without a closure.")
        return found


NESTEROV = {"momentum": 0.9, "nesterov": True}
BITSANDBYTES = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit")
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
DADAPTATION = ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")

# kohya's names; those of one package in one line where they need nothing but their name.
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


def make_optimizer(groups: Sequence[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    """The optimizer that `options` name, over parameter groups as `make_parameter_groups` gives them.

    Raises `UserError` for an unknown name, a package that is not installed, and arguments that the optimizer refuses.
    """
    kind = _kind_of(options.optimizer_type)
    optimizer_class = kind.load()
    arguments = dict(kind.arguments) | parse_optimizer_args(options.optimizer_args or [])
    _check_arguments(kind, optimizer_class, arguments)
    if kind.one_rate and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            f"--optimizer_type {kind.name} finds one learning rate for all that is trained, but there are several.",
            "Leave out --block_lr, --learning_rate_te1 and --learning_rate_te2.",
        )
    try:
        optimizer = optimizer_class(list(groups), lr=options.learning_rate, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_type {kind.name} refuses its arguments: {error}.", "Mend them.") from error
    if options.is_schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def parse_optimizer_args(words: Sequence[str]) -> dict[str, Any]:
    """`["weight_decay=0.01", "betas=0.9,0.99"]` as arguments of a call; values are Python's numbers, tuples, booleans.

    Raises `UserError` for a word without "=", a value that is not of this kind, and a name given twice.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(f"--optimizer_args: '{word}' is not understood.", "Write name=value, without spaces.")
        if name in arguments:
            raise UserError(f"--optimizer_args: '{name}' is given twice.", "Keep one of the two.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            expected = "It must be a number, numbers with commas, True, False, None or a text in quotes."
            raise UserError(f"--optimizer_args: the value of '{word}' is not understood.", expected) from None
    return arguments


def _kind_of(optimizer_type: str) -> OptimizerKind:
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


def _check_arguments(kind: OptimizerKind, optimizer_class: type[Optimizer], arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for arguments that the class does not take, and for Adafactor's own choice of the rate."""
    if "lr" in arguments:
        raise UserError("--optimizer_args: 'lr' is set by --learning_rate.", "Use that.")
    parameters = inspect.signature(optimizer_class).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = [name for name in parameters if name not in ("params", "lr")]
    unknown = [name for name in arguments if name not in taken]
    if unknown and not takes_any:
        raise UserError(
            f"--optimizer_args: {kind.name} does not take {', '.join(unknown)}.", f"It takes {', '.join(taken)}."
        )
    if kind.name == "Adafactor" and arguments.get("relative_step", True):
        raise UserError(
            "Adafactor with relative_step=True sets the learning rate by itself, against --learning_rate.",
            f"Give {ADAFACTOR_RECIPE}",
        )
