"""Everything a run needs to go on as if it had never stopped: written, found again, read."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.config.atomic_files import replacing_folder, write_text
from library.config.errors import UserError
from library.sdxl.tensor_file import TensorToWrite, open_tensors, read_pickled, write_pickled, write_safetensors

STATE_FORMAT = 1
STATE_SUFFIX = "-state"
LATEST = "latest"

_PROGRESS = "progress.json"
_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.pt"
_OPTIMIZER_KEYS = {"kind", "state", "groups", "settings", "lr_schedule", "scaler"}


@dataclass(frozen=True)
class Setting:
    """What a run was made of: its flags as text, a fingerprint of each image by key, the versions of the libraries."""

    options: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is. No random generator is among it: all of them start anew at each step, from seed and step.

    `started` is when the run began, as its log folder and its sample pictures are named. `step` counts optimizer steps
    from the start of the run, `epoch` (from 0) the epochs before the current one and `step_in_epoch` the steps done in
    it: all of them where the epoch is over and what is due after it is still to be saved. `losses` are those of the
    moving average.
    """

    started: str = ""
    seed: int = 0
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    setting: Setting = field(default_factory=Setting)


@dataclass(frozen=True)
class Resumable:
    """What changes while training: networks by name, what moves their weights, the scaler of fp16 (else None).

    `settings` are the optimizer's, group by group, as today's options give them: what differs there from the options
    that a state was made with holds for the rest of the run.
    """

    networks: Mapping[str, nn.Module]
    optimizer: Optimizer
    settings: Sequence[Mapping[str, Any]]
    lr_schedule: LambdaLR
    scaler: torch.amp.GradScaler | None = None


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def write_state(folder: Path, progress: Progress, learnt: Resumable) -> None:
    """Write a state, whole or not at all; weights are streamed. Raises `CannotWrite` where it cannot be written."""
    with replacing_folder(folder, marker=_PROGRESS) as unfinished:
        write_safetensors(unfinished / _WEIGHTS, _weights(learnt.networks), {"format": "pt"})
        write_pickled(unfinished / _OPTIMIZER, _optimizer_state(learnt))
        about = {
            "format": STATE_FORMAT,
            "written": datetime.now(UTC).isoformat(),
            "bytes": {name: (unfinished / name).stat().st_size for name in (_WEIGHTS, _OPTIMIZER)},
        }
        write_text(unfinished / _PROGRESS, json.dumps(about | asdict(progress), indent=1))


def read_progress(folder: Path) -> Progress:
    """Where the run of a state was; raises `UserError` where the folder is not a whole state."""
    _, progress = _read(folder)
    return progress


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
    _restore_optimizer(learnt, content, folder)
    _restore_schedule(learnt.lr_schedule, learnt.optimizer, content["lr_schedule"])
    if learnt.scaler is not None and content["scaler"] is not None:
        learnt.scaler.load_state_dict(content["scaler"])


def find_state(resume: str, output_dir: Path, output_name: str | None) -> Path:
    """The state that `--resume` names: a folder, or with "latest" the newest whole one of `output_name`.

    Raises `UserError` where there is none. Damaged ones in `output_dir` are named on stderr and passed over.
    """
    if resume != LATEST:
        if not Path(resume).is_dir():
            raise UserError(f"--resume: there is no folder '{resume}'.", "Give a state, or 'latest'.")
        return Path(resume)
    found = []
    for folder in output_dir.glob(f"*{STATE_SUFFIX}"):
        try:
            written, progress = _read(folder)
        except UserError as error:
            print(error.problem, "It is passed over.", file=sys.stderr)
            continue
        if progress.setting.options.get("output_name", str(output_name)) == str(output_name):
            found.append((written, progress.step, folder))
    if not found:
        raise UserError(
            f"--resume latest: '{output_dir}' holds no whole state of a run with the same --output_name.",
            "Train with --save_state first, or name the folder of a state.",
        )
    return max(found)[-1]


def is_state(path: Path) -> bool:
    """Whether `path` is the folder of a state, whole or not, or the file of its weights."""
    folder = path.parent if path.name == _WEIGHTS else path
    try:
        return (folder / _PROGRESS).is_file()
    except OSError:  # no file system takes that for a name
        return False


def _read(folder: Path) -> tuple[str, Progress]:
    """When a state was written, and its progress."""
    try:
        content = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        if content.pop("format") != STATE_FORMAT:
            raise ValueError("it is of another version of this program")
        written, sizes = str(content.pop("written")), content.pop("bytes")
        for name, size in sizes.items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} is cut short")
        return written, Progress(**{**content, "setting": Setting(**content["setting"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"'{folder}' is not a whole state of this program ({error}).",
            "Give a folder that --save_state has written; states of other trainers cannot be resumed.",
        ) from error


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
    return {
        "kind": _kind(learnt),
        "state": [learnt.optimizer.state.get(parameter, {}) for parameter in _parameters(learnt.optimizer)],
        "groups": group_settings(learnt.optimizer),
        "settings": [dict(settings) for settings in learnt.settings],
        "lr_schedule": learnt.lr_schedule.state_dict(),
        "scaler": None if learnt.scaler is None else learnt.scaler.state_dict(),
    }


def _kind(learnt: Resumable) -> list[str]:
    """The optimizer's class (accelerate wraps it) and the names of its groups."""
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


def _restore_optimizer(learnt: Resumable, content: Mapping[str, Any], folder: Path) -> None:
    """torch's `load_state_dict` would round an optimizer's float32 state to the precision of bfloat16 weights."""
    optimizer = learnt.optimizer
    if content["kind"] != _kind(learnt) or len(content["state"]) != len(_parameters(optimizer)):
        raise UserError(
            f"'{folder}' is of another optimizer or other parameter groups.",
            "Give the same --optimizer_type, learning rates and --block_lr as when it was made.",
        )
    saved_states = iter(content["state"])
    for group, saved, then, now in zip(
        optimizer.param_groups, content["groups"], content["settings"], learnt.settings, strict=True
    ):
        group.update(saved)
        group.update({key: value for key, value in now.items() if then.get(key) != value})
        group["initial_lr"] = now["lr"]
        for parameter, state in zip(group["params"], saved_states, strict=False):
            optimizer.state[parameter] = {
                key: _placed(key, value, group, parameter.device) for key, value in state.items()
            }


def _restore_schedule(schedule: LambdaLR, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put the schedule where it was; the rates are those of today's options at that step."""
    schedule.load_state_dict(saved)
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


def _placed(key: str, value: Any, group: Mapping[str, Any], device: torch.device) -> Any:
    """A copy of the value where the optimizer keeps it: beside the parameter, but for torch's own count of steps."""
    if not isinstance(value, torch.Tensor):
        return value
    stays = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if stays else device, copy=True)
