"""Which networks are on the device: those of every step stay there, the others come for a visit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from library.training.mishaps import explained_out_of_memory


def settle(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Move networks to the device to stay; raises `UserError` where it has no room for them."""
    for network in networks:
        with explained_out_of_memory("while the model is loaded"):
            network.to(device)


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
                setattr(module, name, _moved(tensor, device))
        yield
    finally:
        for module, name, tensor in at_home:
            setattr(module, name, tensor)
        if at_home and device.type == "cuda":
            torch.cuda.empty_cache()


def _tensors(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Every parameter and buffer, with the module that holds it and its name there."""
    modules = [module for network in networks for module in network.modules()]
    return [
        (module, name, tensor)
        for module in modules
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
