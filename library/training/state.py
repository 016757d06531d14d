"""The saved state of a run: everything it needs to continue as if it had never stopped, written and read back."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.config.atomic_files import replacing_folder, write_text
from library.config.digests import DigestAbreast, WrittenDigest
from library.config.errors import UserError
from library.optim.lr_schedules import restore_schedule, saved_schedule
from library.optim.rounding import RESIDUAL
from library.optim.state_places import placed_state
from library.sdxl.tensor_file import (
    TensorToWrite,
    first_line,
    open_tensors,
    read_pickled,
    write_pickled,
    write_safetensors,
)
from library.training.progress import (
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    WEIGHTS_FILE,
    DamagedState,
    Progress,
    StateRecord,
    read_record,
)

log = logging.getLogger(__name__)

_OPTIMIZER_KEYS = {"kind", "state", "groups", "settings", "lr_schedule", "scaler"}


class Kept(Protocol):
    """What a state keeps beside weights and optimizer: a dictionary of tensors and plain values, out and in again."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved: tensors, numbers and texts in dictionaries and lists."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take over what was saved. Its tensors are on the CPU and mapped from the file: they have to be copied."""


@dataclass(frozen=True)
class Resumable:
    """What changes while training: networks by name, what moves their weights, the scaler of fp16 (else None).

    `settings` are the settings of the optimizer's parameter groups under the current options: where they differ from
    those the state was saved with, the current ones hold for the rest of the run. `narrow_keys` are the keys of the
    optimizer's state that it keeps in bfloat16 beside bfloat16 weights. `others` are saved under their names, each as
    a file with a digest; what a state does not hold begins where the run continues. With `is_offloaded` the
    optimizer keeps its state in host memory.
    """

    networks: Mapping[str, nn.Module]
    optimizer: Optimizer
    settings: Sequence[Mapping[str, Any]]
    lr_schedule: LRScheduler
    scaler: torch.amp.GradScaler | None = None
    narrow_keys: frozenset[str] = frozenset()
    others: Mapping[str, Kept] = field(default_factory=dict)
    is_offloaded: bool = False


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of the parameter groups, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def write_state(folder: Path, progress: Progress, learnt: Resumable) -> None:
    """Write a state, completely or not at all; weights are streamed. Raise `CannotWrite` if that is impossible."""
    others = {_file_of(name): other for name, other in learnt.others.items()}
    digests = {name: WrittenDigest() for name in (WEIGHTS_FILE, OPTIMIZER_FILE, *others)}
    with replacing_folder(folder, marker=PROGRESS_FILE) as unfinished:
        write_safetensors(unfinished / WEIGHTS_FILE, _weights(learnt.networks), {"format": "pt"}, digests[WEIGHTS_FILE])
        write_pickled(unfinished / OPTIMIZER_FILE, _optimizer_state(learnt), digests[OPTIMIZER_FILE])
        for name, other in others.items():
            write_pickled(unfinished / name, other.state_dict(), digests[name])
        sizes = {name: (unfinished / name).stat().st_size for name in digests}
        record = StateRecord(progress, sizes, {name: each.hex() for name, each in digests.items()})
        write_text(unfinished / PROGRESS_FILE, record.as_text())


def read_learnt(folder: Path, learnt: Resumable) -> None:
    """Load the weights and the optimizer of a state into `learnt`, in place.

    Raise `DamagedState` if its files are not what was written (`learnt` is of no use then), `UserError` if they belong
    to another set of trained networks or to another optimizer.
    """
    digests = read_record(folder).digests
    with _checked(folder / WEIGHTS_FILE, digests) as follow:
        changed = _read_weights(folder, learnt.networks, follow)
    with _checked(folder / OPTIMIZER_FILE, digests) as follow:
        content = _read_optimizer(folder / OPTIMIZER_FILE)
        try:
            _restore_optimizer(learnt, content, folder, changed, follow)
            restore_schedule(learnt.lr_schedule, learnt.optimizer, content["lr_schedule"])
            if learnt.scaler is not None and content["scaler"] is not None:
                learnt.scaler.load_state_dict(content["scaler"])
        except _RESTORING_ERRORS as error:
            raise UserError(
                f"'{folder / OPTIMIZER_FILE}' does not hold the optimizer of this run ({first_line(error)}).",
                "Resume from another state.",
            ) from error
    _read_others(folder, learnt.others, digests)


def _file_of(name: str) -> str:
    return f"{name}.pt"


def _read_others(folder: Path, others: Mapping[str, Kept], digests: Mapping[str, str]) -> None:
    """Load what a state holds beside weights and optimizer, and say what it lacks and what is not continued."""
    files = {_file_of(name): other for name, other in others.items()}
    for name in digests.keys() - files.keys() - {WEIGHTS_FILE, OPTIMIZER_FILE}:
        log.warning("'%s' is not continued by this run, and its next states are without it", folder / name)
    for name, other in files.items():
        if name not in digests:
            log.warning("'%s' holds no %s: what it would hold begins at the step of the state", folder, name)
            continue
        with _checked(folder / name, digests):
            try:
                other.load_state_dict(read_pickled(folder / name))
            except _RESTORING_ERRORS as error:
                raise UserError(
                    f"'{folder / name}' does not belong to this run ({first_line(error)}).",
                    "Resume from another state, or with the options of the run that saved it.",
                ) from error


_RESTORING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What an optimizer's state raises that this program did not write, or whose digest nobody noted."""


@contextmanager
def _checked(path: Path, digests: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
    """Compare the digest of a file that is read in the block, from its beginning to its end, with the recorded one.

    What is yielded is called with the number of bytes after each part was read. Raise `DamagedState` if they differ,
    whatever reading such a file has raised.
    """
    if path.name not in digests:  # a state of an earlier version
        yield lambda num_bytes: None
        return
    with DigestAbreast(path) as following:
        try:
            yield following.advance
        finally:  # the numbers of a damaged file may have raised anything
            if following.hex() != digests[path.name]:
                raise DamagedState(path.parent, f"{path.name} is not as it was written")


def _read_weights(folder: Path, networks: Mapping[str, nn.Module], follow: Callable[[int], None]) -> set[nn.Parameter]:
    """Load the weights into `networks`; return the parameters that were saved in another precision."""
    changed = set()
    with open_tensors(folder / WEIGHTS_FILE) as reader, torch.no_grad():
        expected = {tensor.name: tensor.shape for tensor in _weights(networks)}
        if expected != reader.shapes:
            raise UserError(
                f"'{folder}' holds other weights than this run trains.",
                "Pass the same model and --train_text_encoder flags as when the state was made.",
            )
        for name, network in networks.items():
            parameters = dict(network.named_parameters())
            for key, tensor in network.state_dict().items():
                saved = reader.get(f"{name}.{key}")
                tensor.copy_(saved)
                follow(saved.nbytes)
                if key in parameters and saved.dtype != tensor.dtype:
                    changed.add(parameters[key])
    return changed


def _weights(networks: Mapping[str, nn.Module]) -> Iterator[TensorToWrite]:
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            yield TensorToWrite(f"{name}.{key}", tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# -- optimizer --------------------------------------------------------------------------------------------------------


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(learnt: Resumable) -> dict[str, Any]:
    """Return plain tensors and numbers, so that reading runs no pickled code; parameters are known by position."""
    return {
        "kind": _kind(learnt),
        "state": [learnt.optimizer.state.get(parameter, {}) for parameter in _parameters(learnt.optimizer)],
        "groups": group_settings(learnt.optimizer),
        "settings": [dict(settings) for settings in learnt.settings],
        "lr_schedule": saved_schedule(learnt.lr_schedule),
        "scaler": None if learnt.scaler is None else learnt.scaler.state_dict(),
    }


def _kind(learnt: Resumable) -> list[str]:
    """Return the optimizer's class (accelerate wraps it) and the names of its groups."""
    optimizer = getattr(learnt.optimizer, "optimizer", learnt.optimizer)
    return [type(optimizer).__name__, *(settings["name"] for settings in learnt.settings)]


def _read_optimizer(path: Path) -> dict[str, Any]:
    try:
        content = read_pickled(path)
    except UserError as error:
        raise UserError(error.problem, "Resume from an older state.") from error
    if not isinstance(content, dict) or content.keys() != _OPTIMIZER_KEYS:
        raise UserError(f"'{path}' does not hold an optimizer.", "Resume from another state.")
    return content


def _restore_optimizer(
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
    saved_states = iter(content["state"])
    for group, saved, then, now in zip(
        optimizer.param_groups, content["groups"], content["settings"], learnt.settings, strict=True
    ):
        group.update(saved)
        group.update({key: value for key, value in now.items() if then.get(key) != value})
        group["initial_lr"] = now["lr"]
        for parameter, state in zip(group["params"], saved_states, strict=False):
            _require_fitting_moments(state, parameter)
            device = torch.device("cpu") if learnt.is_offloaded else parameter.device
            placed = {key: placed_state(optimizer, key, value, group, device) for key, value in state.items()}
            follow(sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)))
            optimizer.state[parameter] = (
                _in_present_precision(placed, parameter, learnt.narrow_keys) if parameter in changed else placed
            )


_SHAPED_LIKE_WEIGHTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", RESIDUAL})


def _require_fitting_moments(state: Mapping[str, Any], parameter: nn.Parameter) -> None:
    """Raise `ValueError` for moments that another weight must have had."""
    for key in _SHAPED_LIKE_WEIGHTS & state.keys():
        shape = getattr(state[key], "shape", None)
        if shape is not None and shape != parameter.shape:
            raise ValueError(f"{key} of the shape {list(shape)} for a weight of {list(parameter.shape)}")


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
