"""Whether the disk holds what a run is going to write, before it starts."""

import shutil
from pathlib import Path

import torch
from torch import nn

from library.config.errors import UserError


def bytes_of(networks: list[nn.Module], dtype: torch.dtype | None) -> int:
    """Bytes of the networks' weights in `dtype` (None: as they are held)."""
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def require_disk_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` if the disk of `folder` has less than `needed` bytes free; `what` names what needs them."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of '{folder}' has {free / 1e9:.1f} GB free, and {what} takes {needed / 1e9:.1f} GB: "
            f"{(needed - free) / 1e9:.1f} GB are missing.",
            "Free some space, choose another --output_dir, or keep fewer models (--save_last_n_steps, ..._epochs).",
        )
