"""Where networks are: those of every step on the device; the others in a file, from which they come for a visit."""

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from library.sdxl.tensor_file import raw_bytes
from library.training.failures import explained_out_of_memory

_ALIGNMENT = 64  # bytes; what vector instructions like best


def settle(
    networks: Iterable[nn.Module], *, of_steps: Collection[nn.Module], device: torch.device, folder: Path
) -> None:
    """Give each network its place: those `of_steps` on the device, the others, which are frozen, in files of `folder`.

    Raise `UserError` where the device has no room.
    """
    for network in networks:
        if network not in of_steps:
            set_aside(network, folder)
            continue
        with explained_out_of_memory("while the model is loaded"):
            network.to(device)
    _return_freed_memory()


def set_aside(network: nn.Module, folder: Path) -> None:
    """Move a frozen network from memory into a separate file in `folder`, of which the weights are then views.

    The system reads of it what is used, and may forget it again. The file has no name: nobody can change or remove it,
    as they could the model's, and it is gone with the process, however that ends. Where it cannot be written, the
    network stays in memory.
    """
    tensors = _tensors([network])
    with suppress(OSError):
        views = _written([tensor for _, _, tensor in tensors], folder)
        for (module, name, tensor), view in zip(tensors, views, strict=True):
            setattr(module, name, _in_place_of(tensor, view))


def _written(tensors: list[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """Return the same tensors as views of a nameless file; raise `OSError` where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for tensor in tensors:
            offsets.append(file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT))
            file.write(raw_bytes(tensor))
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return [
        torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


@contextmanager
def visiting(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Within the block the frozen `networks` are on `device`; afterwards they are what they were, where they were.

    What they leave behind stays in place, so that going back costs nothing; what they had on the device is freed.
    A network that lives on the device is left alone.
    """
    at_home: list[tuple[nn.Module, str, torch.Tensor]] = []
    try:
        for module, name, tensor in _tensors(networks):
            if tensor.device.type != device.type:
                at_home.append((module, name, tensor))
                setattr(module, name, _in_place_of(tensor, tensor.detach().to(device)))
        yield
    finally:
        for module, name, tensor in at_home:
            setattr(module, name, tensor)
        if at_home and device.type == "cuda":
            torch.cuda.empty_cache()


def _tensors(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Return every parameter and buffer, with the module that holds it and its name there."""
    modules = [module for network in networks for module in network.modules()]
    return [
        (module, name, tensor)
        for module in modules
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]


def _return_freed_memory() -> None:
    """Have the system get back what is free: glibc would keep weights of up to 32 MB for later."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _in_place_of(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`other` as what `tensor` is: a frozen parameter or a buffer."""
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other
