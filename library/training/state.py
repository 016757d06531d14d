"""Everything a run needs to go on as if it had never stopped: written, found again, read."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.config.errors import UserError
from library.config.output_files import replacing, replacing_folder, write_text
from library.sdxl.tensor_file import TensorToWrite, open_tensors, write_safetensors

STATE_FORMAT = 1
STATE_SUFFIX = "-state"
LATEST = "latest"

_PROGRESS = "progress.json"
_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Setting:
    """What a run was made of: its flags as text, a fingerprint of each image by key, the versions of the libraries."""

    options: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is. No random generator is among it: all of them start anew at each step, from seed and step.

    `step` counts optimizer steps from the start of the run, `epoch` (from 0) the epochs before the current one and
    `step_in_epoch` the steps done in it. `losses` are those of the moving average, `log_folder` is where the run logs.
    """

    seed: int = 0
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    log_folder: str | None = None
    setting: Setting = field(default_factory=Setting)


@dataclass(frozen=True)
class Resumable:
    """What changes while training: networks by name, what moves their weights, the scaler of fp16 (else None)."""

    networks: Mapping[str, nn.Module]
    optimizer: Optimizer
    lr_schedule: LRScheduler
    scaler: torch.amp.GradScaler | None = None


def write_state(folder: Path, progress: Progress, learnt: Resumable) -> None:
    """Write a state, whole or not at all; weights are streamed. Raises `UserError` where it cannot be written."""
    with replacing_folder(folder, marker=_PROGRESS) as unfinished:
        write_safetensors(unfinished / _WEIGHTS, _weights(learnt.networks), {"format": "pt"})
        with replacing(unfinished / _OPTIMIZER) as file:
            torch.save(_optimizer_state(learnt), file)
        write_text(unfinished / _PROGRESS, json.dumps({"format": STATE_FORMAT, **asdict(progress)}, indent=1))


def read_progress(folder: Path) -> Progress:
    """Where the run of a state was; raises `UserError` where the folder is not a whole state."""
    try:
        content = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        if content.pop("format") != STATE_FORMAT:
            raise ValueError("it is of another version of this program")
        return Progress(**{**content, "setting": Setting(**content["setting"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"'{folder}' is not a state of this program ({error}).",
            "Give a folder that --save_state has written; states of other trainers cannot be resumed.",
        ) from error


def read_learnt(folder: Path, learnt: Resumable) -> None:
    """Put the weights and the optimizer of a state into `learnt`, in place.

    Raises `UserError` where the state is damaged or belongs to another set of trained parts.
    """
    with open_tensors(folder / _WEIGHTS) as reader:
        expected = {tensor.name: tensor.shape for tensor in _weights(learnt.networks)}
        if expected != reader.shapes:
            raise UserError(
                f"'{folder}' holds other weights than this run trains.",
                "Give the same model and --train_text_encoder flags as when the state was made.",
            )
        with torch.no_grad():
            for name, network in learnt.networks.items():
                for key, tensor in network.state_dict().items():
                    tensor.copy_(reader.get(f"{name}.{key}"))
    content = _read_optimizer(folder / _OPTIMIZER)
    _restore_optimizer(learnt.optimizer, content, folder)
    learnt.lr_schedule.load_state_dict(content["lr_schedule"])
    if learnt.scaler is not None and content["scaler"] is not None:
        learnt.scaler.load_state_dict(content["scaler"])


def find_state(resume: str, output_dir: Path) -> Path:
    """The state that `--resume` names: a folder, or with "latest" the furthest whole state in `output_dir`.

    Raises `UserError` where there is none.
    """
    if resume != LATEST:
        if not Path(resume).is_dir():
            raise UserError(f"--resume: there is no folder '{resume}'.", "Give a state, or 'latest'.")
        return Path(resume)
    states = list(_whole_states(output_dir))
    if not states:
        raise UserError(f"--resume latest: '{output_dir}' holds no state.", "Train with --save_state first.")
    return max(states)[1]


def _whole_states(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of each state; those not finished still have another name."""
    for folder in output_dir.glob(f"*{STATE_SUFFIX}"):
        if (folder / _PROGRESS).is_file():
            yield read_progress(folder).step, folder


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
    """Plain tensors and numbers, so that reading needs no pickled code; parameters are known by their position."""
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in learnt.optimizer.param_groups
    ]
    return {
        "state": [learnt.optimizer.state.get(parameter, {}) for parameter in _parameters(learnt.optimizer)],
        "groups": groups,
        "lr_schedule": learnt.lr_schedule.state_dict(),
        "scaler": None if learnt.scaler is None else learnt.scaler.state_dict(),
    }


def _read_optimizer(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"'{path}' is damaged ({error}).", "Resume from an older state.") from error


def _restore_optimizer(optimizer: Optimizer, content: Mapping[str, Any], folder: Path) -> None:
    """torch's `load_state_dict` would round an optimizer's float32 state to the precision of bfloat16 weights."""
    parameters = _parameters(optimizer)
    groups: Sequence[Mapping[str, Any]] = content["groups"]
    same_groups = [group["name"] for group in groups] == [group["name"] for group in optimizer.param_groups]
    if len(content["state"]) != len(parameters) or not same_groups:
        raise UserError(
            f"'{folder}' is of another optimizer or other parameter groups.",
            "Give the same --optimizer_type, learning rates and --block_lr as when it was made.",
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)
    for parameter, saved in zip(parameters, content["state"], strict=True):
        optimizer.state[parameter] = {key: _placed(key, value, parameter.device) for key, value in saved.items()}


def _placed(key: str, value: Any, device: torch.device) -> Any:
    """The value where the optimizer keeps it: beside the parameter, but for the count of steps (torch: the CPU)."""
    return value.to(device) if isinstance(value, torch.Tensor) and key != "step" else value
