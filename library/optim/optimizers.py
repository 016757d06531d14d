"""Which parameters are trained at which rate, and by which optimizer."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from library.config.errors import UserError
from library.optim.known_optimizers import OPTIMIZERS, OptimizerKind, kind_of
from library.optim.options import OptimizerOptions, parse_block_rates
from library.sdxl.unet_blocks import NUM_UNET_BLOCKS, unet_block_index

# -- parameters -------------------------------------------------------------------------------------------------------


def make_parameter_groups(
    options: OptimizerOptions,
    unet: Iterable[tuple[str, Parameter]],
    text_encoder_l: Iterable[Parameter] = (),
    text_encoder_g: Iterable[Parameter] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups `{"name", "params", "lr"}`: "unet", "text_encoder_l", "text_encoder_g".

    `unet` yields single-file names without `model.diffusion_model.` (read only for `block_lr`, where the groups are
    "unet block 0" to "unet block 22"). Pass a text encoder's parameters only where it is to be trained. What has a
    rate of 0 gets no group and `requires_grad` False; all else gets `requires_grad` True. Raise `UserError` where
    nothing is left to train.
    """
    rates = rates_of_parts(options)
    parts = {name: (parameters, rates[name]) for name, parameters in _unet_parts(unet, options).items()} | {
        "text_encoder_l": (list(text_encoder_l), rates["text_encoder_l"]),
        "text_encoder_g": (list(text_encoder_g), rates["text_encoder_g"]),
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


def rates_of_parts(options: OptimizerOptions) -> dict[str, float]:
    """Return the learning rate of each part: "unet", or "unet block 0" to "unet block 22", and the text encoders."""
    if options.block_lr is None:
        rates = {"unet": options.learning_rate}
    else:
        rates = {_block(i): rate for i, rate in enumerate(parse_block_rates(options.block_lr))}
    return rates | {
        "text_encoder_l": _rate_or(options.learning_rate_te1, options.learning_rate),
        "text_encoder_g": _rate_or(options.learning_rate_te2, options.learning_rate),
    }


def _unet_parts(unet: Iterable[tuple[str, Parameter]], options: OptimizerOptions) -> dict[str, list[Parameter]]:
    """Return names to parameters: the U-Net as one part, or one part for each block."""
    if options.block_lr is None:
        return {"unet": [parameter for _, parameter in unet]}
    blocks: dict[str, list[Parameter]] = {_block(i): [] for i in range(NUM_UNET_BLOCKS)}
    for name, parameter in unet:
        blocks[_block(unet_block_index(name))].append(parameter)
    return blocks


def _block(index: int) -> str:
    return f"unet block {index}"


def _rate_or(rate: float | None, default: float) -> float:
    return default if rate is None else rate


# -- optimizers -------------------------------------------------------------------------------------------------------


def make_optimizer(groups: Sequence[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    """Return the optimizer that `options` name, over parameter groups as `make_parameter_groups` returns them.

    Raise `UserError` for an unknown name, a package that is not installed, and arguments that the optimizer refuses.
    """
    kind = kind_of(options.optimizer_type)
    optimizer_class = kind.load()
    arguments = dict(kind.arguments) | options.arguments
    _check_arguments(kind, optimizer_class, arguments)
    if kind.one_rate and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            f"--optimizer_type {kind.name} finds one learning rate for all that is trained, but there are several.",
            "Leave out --block_lr, --learning_rate_te1 and --learning_rate_te2.",
        )
    try:
        with redirect_stdout(StringIO()):  # prodigyopt prints which of its arguments are on
            optimizer = optimizer_class(list(groups), lr=options.learning_rate, **arguments)  # type: ignore[call-arg]
    except Exception as error:
        raise _refusal(kind.name, error) from error
    if getattr(optimizer, "is_paged", False) and not torch.cuda.is_available():
        optimizer.is_paged = False  # type: ignore[attr-defined]  # bitsandbytes cannot page on a CPU, and may try to
    if options.is_schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


@contextmanager
def tried(optimizer_type: str) -> Iterator[None]:
    """Within the block, turn whatever an optimizer raises into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _refusal(kind_of(optimizer_type).name, error) from error


def _refusal(name: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    if not isinstance(error, (TypeError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    return UserError(
        f"--optimizer_type {name} refuses its arguments: {reason}.",
        "Correct --optimizer_args, or choose another --optimizer_type.",
    )


def require_every_shape(options: OptimizerOptions) -> None:
    """Raise `UserError` unless the optimizer steps weights of 1, 2 and 4 dimensions, as SDXL has.

    One by a class path is tried with a step on a few numbers; those that have a name are known to.
    """
    kind = kind_of(options.optimizer_type)
    if kind in OPTIMIZERS:
        return
    parameters = [Parameter(torch.zeros(shape)) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        make_optimizer([{"params": parameters, "lr": options.learning_rate}], options).step()
    except Exception as error:
        reason = error.__cause__ or error
        named = next((each.name for each in OPTIMIZERS if each.class_name == kind.class_name), None)
        raise UserError(
            f"--optimizer_type {kind.name} cannot train SDXL, whose weights have 1, 2 and 4 dimensions and dense "
            f"gradients: {reason}.",
            "Choose another optimizer." if named is None else f"--optimizer_type={named} can.",
        ) from error


def _check_arguments(kind: OptimizerKind, optimizer_class: type[Optimizer], arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for arguments that the class does not take."""
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
