"""The optimizer in a state: what it keeps for each weight, its settings and its schedule, out and in again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from library.config.errors import UserError
from library.optim.lr_schedules import saved_schedule
from library.optim.rounding import RESIDUAL
from library.optim.state_places import placed_state, unwrapped
from library.sdxl.tensor_file import read_pickled
from library.training.resumable import Resumable, group_settings

_OPTIMIZER_KEYS = {"kind", "state", "groups", "settings", "lr_schedule", "scaler"}


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(learnt: Resumable) -> dict[str, Any]:
    """Return plain tensors and numbers, so that reading runs no pickled code; parameters are known by position.

    What the optimizer keeps in parts is returned as tensors of all processes.
    """
    return {
        "kind": _kind(learnt),
        "state": [_state_of(learnt, parameter) for parameter in _parameters(learnt.optimizer)],
        "groups": group_settings(learnt.optimizer),
        "settings": [dict(settings) for settings in learnt.settings],
        "lr_schedule": saved_schedule(learnt.lr_schedule),
        "scaler": None if learnt.scaler is None else learnt.scaler.state_dict(),
    }


def _state_of(learnt: Resumable, parameter: nn.Parameter) -> dict[str, Any]:
    state: dict[str, Any] = learnt.optimizer.state.get(parameter, {})
    if learnt.shards is None:
        return state
    return {
        key: learnt.shards.spread(value, parameter) if _belongs_to_rows(learnt, key, value, parameter.shape) else value
        for key, value in state.items()
    }


def _belongs_to_rows(learnt: Resumable, key: str, value: Any, shape: torch.Size) -> bool:
    """Return whether something is kept for the rows of a weight, or of a part, of this shape: in parts like it.

    That is a number for each of the weight's, or what the optimizer says.
    """
    if not isinstance(value, torch.Tensor):
        return False
    optimizer = unwrapped(learnt.optimizer)
    if getattr(optimizer, "steps_in_parts", False):
        return bool(optimizer.belongs_to_rows(key, value))
    return value.shape == shape


def _kind(learnt: Resumable) -> list[str]:
    """Return the optimizer's class and the names of its groups."""
    return [type(unwrapped(learnt.optimizer)).__name__, *(settings["name"] for settings in learnt.settings)]


def read_optimizer(path: Path) -> dict[str, Any]:
    """Return what `optimizer_state` has returned. Raise `UserError` for a file of another kind."""
    try:
        content = read_pickled(path)
    except UserError as error:
        raise UserError(error.problem, "Resume from an older state.") from error
    if not isinstance(content, dict) or content.keys() != _OPTIMIZER_KEYS:
        raise UserError(f"'{path}' does not hold an optimizer.", "Resume from another state.")
    return content


def place_of(learnt: Resumable, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return where a tensor of the optimizer's state is to be read: "optimizer.pt/state/3/exp_avg" for parameter 3."""
    parameter = _parameters(learnt.optimizer)[int(path.split("/")[2])]
    device = torch.device("cpu") if learnt.is_offloaded else parameter.device
    return empty_place(learnt, tensor, device)


def empty_place(learnt: Resumable, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return memory for a tensor that is saved in parts: for that of this process, or for all of it."""
    if learnt.shards is not None:
        return learnt.shards.empty(tensor.shape, tensor.dtype, device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def restore_optimizer(
    learnt: Resumable,
    content: Mapping[str, Any],
    folder: Path,
    changed: set[nn.Parameter],
    follow: Callable[[int], None],
) -> None:
    """Load the optimizer. torch's `load_state_dict` would round float32 state to the precision of bfloat16 weights.

    The state of `changed` parameters, saved in another precision, gets the one that the optimizer keeps it in now.
    """
    optimizer = learnt.optimizer
    if content["kind"] != _kind(learnt) or len(content["state"]) != len(_parameters(optimizer)):
        raise UserError(
            f"'{folder}' belongs to another optimizer or to other parameter groups.",
            "Pass the same --optimizer_type, learning rates and --block_lr as when it was made.",
        )
    saved_states: list[dict[str, Any]] = content["state"]
    place = 0
    for group, saved, then, now in zip(
        optimizer.param_groups, content["groups"], content["settings"], learnt.settings, strict=True
    ):
        group.update(saved)
        group.update({key: value for key, value in now.items() if then.get(key) != value})
        group["initial_lr"] = now["lr"]
        for parameter in group["params"]:
            state, saved_states[place] = saved_states[place], {}  # freed as soon as it is copied
            place += 1
            shape = parameter.shape if learnt.shards is None else learnt.shards.whole_shape(parameter)
            _require_fitting_moments(state, shape)
            state = {key: _own_part(learnt, key, value, shape) for key, value in state.items()}
            device = torch.device("cpu") if learnt.is_offloaded else parameter.device
            placed = {key: placed_state(optimizer, key, value, group, device) for key, value in state.items()}
            follow(sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)))
            optimizer.state[parameter] = (
                _in_present_precision(placed, parameter, learnt.narrow_keys) if parameter in changed else placed
            )


def _own_part(learnt: Resumable, key: str, value: Any, whole: torch.Size) -> Any:
    """Return what this process keeps of something saved: rows of what is kept in parts, all of the rest."""
    if learnt.shards is None or not _belongs_to_rows(learnt, key, value, whole):
        return value
    return learnt.shards.part(value)


_SHAPED_LIKE_WEIGHTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", RESIDUAL})


def _require_fitting_moments(state: Mapping[str, Any], whole: torch.Size) -> None:
    """Raise `ValueError` for moments that another weight must have had."""
    for key in _SHAPED_LIKE_WEIGHTS & state.keys():
        shape = getattr(state[key], "shape", None)
        if shape is not None and shape != whole:
            raise ValueError(f"{key} of the shape {list(shape)} for a weight of {list(whole)}")


def _in_present_precision(
    state: dict[str, Any], parameter: nn.Parameter, narrow_keys: frozenset[str]
) -> dict[str, Any]:
    """Return the state of a parameter that was saved in another precision as the optimizer keeps it beside it now."""
    if parameter.dtype != torch.bfloat16 and RESIDUAL in state:  # what bfloat16 could not hold, its place is here
        parameter.data += state.pop(RESIDUAL).to(parameter.device)
    kept = {key: torch.bfloat16 if key in narrow_keys else torch.float32 for key in state}
    return {
        key: value.to(kept[key])
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }
