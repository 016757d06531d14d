"""Where the state of an optimizer lies: beside the weights, in paged memory, or on the host."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

_PAGED_KEYS = frozenset({"state1", "state2"})  # of the optimizers of bitsandbytes


def placed_state(optimizer: Optimizer, key: str, value: Any, group: Mapping[str, Any], device: torch.device) -> Any:
    """Return a copy of saved state where the optimizer keeps it, beside weights on `device`.

    The large state of a paged optimizer of bitsandbytes lies in its paged memory.
    """
    if not isinstance(value, torch.Tensor):
        return value
    paged = unwrapped(optimizer)
    if getattr(paged, "is_paged", False) and key in _PAGED_KEYS:
        return paged.get_state_buffer(torch.empty_like(value, device=device), dtype=value.dtype).copy_(value)
    return value.to("cpu" if stays_on_cpu(key, group) else device, copy=True)


def unwrapped(optimizer: Optimizer) -> Any:
    """Return the optimizer itself, which accelerate may have wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def stays_on_cpu(key: str, group: Mapping[str, Any]) -> bool:
    """Return whether this is the count of steps that torch's optimizers keep on the CPU."""
    return key == "step" and not (group.get("fused") or group.get("capturable"))
