"""What changes while training, and is saved in a state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.training.sharding import Shards


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
    optimizer keeps its state in host memory. `shards` are there if each process keeps a part of every weight.
    """

    networks: Mapping[str, nn.Module]
    optimizer: Optimizer
    settings: Sequence[Mapping[str, Any]]
    lr_schedule: LRScheduler
    scaler: torch.amp.GradScaler | None = None
    narrow_keys: frozenset[str] = frozenset()
    others: Mapping[str, Kept] = field(default_factory=dict)
    is_offloaded: bool = False
    shards: Shards | None = None


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of the parameter groups, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
