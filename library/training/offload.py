"""Which networks are on the device: those of every step always, the others only for as long as they are needed."""

import ctypes
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from library.training.failures import explained_out_of_memory


def place_networks(
    networks: Iterable[nn.Module], needed_each_step: Collection[nn.Module], device: torch.device
) -> None:
    """Move the networks `needed_each_step` to `device`; the others, which are frozen, stay in host memory.

    Beside a U-Net on a GPU that is 1.7 GiB of host memory for both text encoders and the VAE in bfloat16. The U-Net is
    read straight to the GPU, so that no more is ever held: 2.2 GiB with torch (full size on Linux, the GPU a stand-in).
    To keep the others in a mapped file would write 1.7 GiB at each start.

    Raise `UserError` if the device has no room.
    """
    for network in networks:
        if network in needed_each_step:
            with explained_out_of_memory("while the model is loaded"):
                network.to(device)
    _return_freed_memory()


@contextmanager
def on_device(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Within the block the frozen `networks` are on `device`; afterwards they have the tensors they had before.

    Their tensors in host memory stay where they are, so that nothing is copied back; the copies on the device are
    freed. A network that is on the device already is left alone.
    """
    in_host_memory: list[tuple[nn.Module, str, torch.Tensor]] = []
    try:
        for module, name, tensor in _tensors(networks):
            if tensor.device.type != device.type:
                in_host_memory.append((module, name, tensor))
                copy = tensor.detach().to(device)
                is_weight = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(copy, requires_grad=False) if is_weight else copy)
        yield
    finally:
        for module, name, tensor in in_host_memory:
            setattr(module, name, tensor)
        if in_host_memory and device.type == "cuda":
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
    """Return free memory to the system: glibc keeps freed weights of up to 32 MB each for later."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
