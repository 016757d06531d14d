"""Networks that are on a device for a while. The meta device, which every machine has, stands for the GPU."""

import copy
import sys

import psutil
import pytest
import torch
from torch import nn

from library.training.offload import on_device, place_networks

DEVICE = torch.device("meta")
HOST = torch.device("cpu")


@pytest.fixture
def network() -> nn.Module:
    """Frozen layers with a buffer, one of them within another."""
    made = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    return made.requires_grad_(False).eval()


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def devices(network: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in tensors(network).values()}


def test_within_the_block_the_whole_network_is_on_the_device_and_afterwards_it_has_the_very_same_tensors(network):
    before = tensors(network)
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    with on_device(DEVICE, network):
        assert devices(network) == {DEVICE}
        assert tensors(network).keys() == before.keys()
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert tensors(network).keys() == before.keys()
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in before.items()} == addresses


def test_a_network_returns_after_an_error_too(network):
    with pytest.raises(torch.OutOfMemoryError), on_device(DEVICE, network):
        raise torch.OutOfMemoryError("no memory for the image")
    assert devices(network) == {HOST}


def test_a_network_for_which_there_is_no_room_returns_whole(network, monkeypatch):
    room = [True, True, False]  # for two tensors of the first network

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not room.pop(0):
            raise torch.OutOfMemoryError("full")
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), on_device(DEVICE, network):
        raise AssertionError("it cannot be there")
    assert devices(network) == {HOST}


def test_a_network_that_is_on_the_device_already_is_left_alone(network):
    place_networks([network], needed_each_step=[network], device=DEVICE)
    before = tensors(network)
    with on_device(DEVICE, network):
        assert all(tensors(network)[name] is tensor for name, tensor in before.items())
    assert devices(network) == {DEVICE}
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())


def test_networks_of_every_step_move_to_the_device_and_the_others_stay_in_host_memory(network):
    other = copy.deepcopy(network)
    before = tensors(other)
    place_networks([network, other], needed_each_step=[network], device=DEVICE)
    assert (devices(network), devices(other)) == ({DEVICE}, {HOST})
    assert all(tensors(other)[name] is tensor for name, tensor in before.items())


@pytest.mark.skipif(sys.platform != "linux", reason="freed memory is returned by a call of the Linux C library")
def test_the_host_memory_of_a_network_that_has_moved_is_returned_to_the_system():
    torch.ones(5_000_000)  # once 20 MB have been freed, glibc keeps what is smaller on its heap
    layers = [nn.Linear(1000, 1000).requires_grad_(False) for _ in range(50)]  # 200 MB, in pieces of 4
    above = torch.ones(1_000_000)  # and does not lower the heap while something lies above
    held = psutil.Process().memory_info().rss
    place_networks(layers, needed_each_step=layers, device=DEVICE)
    assert held - psutil.Process().memory_info().rss > 190e6
    del above
