"""Networks that come to a device for a visit. The meta device, which every machine has, stands for the GPU."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.phases import anonymous_bytes
from library.training.offload import set_aside, settle, visiting

ELSEWHERE = torch.device("meta")
HOME = torch.device("cpu")


@pytest.fixture
def network() -> nn.Module:
    """Frozen layers with a buffer, one of them within another."""
    made = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    return made.requires_grad_(False).eval()


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def devices(network: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in tensors(network).values()}


def test_a_visitor_is_wholly_there_and_goes_back_to_the_very_tensors_it_left(network):
    before = tensors(network)
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    with visiting(ELSEWHERE, network):
        assert devices(network) == {ELSEWHERE}
        assert tensors(network).keys() == before.keys()
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert tensors(network).keys() == before.keys()
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in before.items()} == addresses


def test_a_visitor_goes_back_after_an_error_too(network):
    with pytest.raises(torch.OutOfMemoryError), visiting(ELSEWHERE, network):
        raise torch.OutOfMemoryError("no memory for the picture")
    assert devices(network) == {HOME}


def test_a_visitor_for_which_there_is_no_room_goes_back_whole(network, monkeypatch):
    room = [True, True, False]  # for two tensors of the first network

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not room.pop(0):
            raise torch.OutOfMemoryError("full")
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), visiting(ELSEWHERE, network):
        raise AssertionError("it cannot be there")
    assert devices(network) == {HOME}


def test_what_lives_on_the_device_is_left_alone(network, tmp_path):
    settle([network], of_steps=[network], device=ELSEWHERE, folder=tmp_path)
    before = tensors(network)
    with visiting(ELSEWHERE, network):
        assert all(tensors(network)[name] is tensor for name, tensor in before.items())
    assert devices(network) == {ELSEWHERE}
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())


def test_networks_of_steps_settle_on_the_device_and_the_others_stay_off(network, tmp_path):
    other = copy.deepcopy(network)
    settle([network, other], of_steps=[network], device=ELSEWHERE, folder=tmp_path)
    assert (devices(network), devices(other)) == ({ELSEWHERE}, {HOME})


# -- in a file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_set_aside_is_the_same_bit_for_bit_and_leaves_no_name(network, tmp_path, dtype):
    network.to(dtype)
    before = {name: tensor.clone() for name, tensor in tensors(network).items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors(network).items()}
    inputs = torch.ones(2, 3, dtype=dtype)
    expected = network(inputs)
    set_aside(network, tmp_path / "my output")
    after = tensors(network)
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert all(after[name].data_ptr() != address for name, address in addresses.items())
    assert torch.equal(network(inputs), expected)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    # (Windows shows the file until it is closed.)
    assert os.name == "nt" or list((tmp_path / "my output").iterdir()) == []


def test_a_network_set_aside_can_visit_and_goes_back_to_its_file(network, tmp_path):
    set_aside(network, tmp_path)
    before = tensors(network)
    with visiting(ELSEWHERE, network):
        assert devices(network) == {ELSEWHERE}
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())


def test_a_network_stays_in_memory_where_no_file_can_be_written(network, tmp_path):
    (tmp_path / "file").touch()
    before = tensors(network)
    set_aside(network, tmp_path / "file")
    assert all(tensors(network)[name] is tensor for name, tensor in before.items())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much of the memory is anonymous")
def test_a_network_set_aside_gives_its_memory_back(tmp_path):
    layers = [nn.Linear(1000, 1000).requires_grad_(False) for _ in range(50)]  # 200 MB, in pieces of 4
    held = anonymous_bytes()
    settle(layers, of_steps=[], device=HOME, folder=tmp_path)
    assert held - anonymous_bytes() > 190e6
