"""Weights of a network of a diffusers folder, read straight to a device: host memory holds one of them at a time."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from library.sdxl.foreign_weights import is_finite, require_finite
from library.sdxl.tensor_file import TensorReader, open_tensors

_USUAL_NUMBERS = {"F32", "F16", "BF16"}


def read_into(network: nn.Module, folder: Path, file: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Read the weights of a network without weights from `file`, or from its parts, to `device`; return whether it did.

    It does not where the folder holds something else than safetensors with exactly these tensors: diffusers knows older
    names and other files. Raise `UserError` for a damaged file, and for weights that hold NaN or Inf.
    """
    paths = _parts(folder, file)
    if not paths:
        return False
    with ExitStack() as stack:
        place_of: dict[str, TensorReader] = {}
        for path in paths:
            reader = stack.enter_context(open_tensors(path))
            place_of |= dict.fromkeys(reader.shapes, reader)
        if not _are_those_of(network, place_of):
            return False
        weights, not_finite = {}, []
        for name, reader in place_of.items():
            weights[name] = reader.get(name).to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            if not is_finite(weights[name]):
                not_finite.append(name)
    require_finite(str(folder), not_finite)
    network.load_state_dict(weights, assign=True)
    return True


def _parts(folder: Path, file: str) -> list[Path]:
    """Return the files that hold the weights, none if they are not all there."""
    index = folder / f"{file}.index.json"
    paths = [folder / file]
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [folder / name for name in sorted(set(named))]
        except (ValueError, KeyError, AttributeError, TypeError):  # diffusers says what is wrong with it
            return []
    return paths if all(path.is_file() for path in paths) else []


def _are_those_of(network: nn.Module, place_of: dict[str, TensorReader]) -> bool:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: reader.shapes[name] for name, reader in place_of.items()}
    return found == expected and {reader.dtypes[name] for name, reader in place_of.items()} <= _USUAL_NUMBERS
