"""State in host memory: the same weights and state, which is beside the weights only while they are updated."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from library.config.errors import UserError
from library.config.options import problems_of
from library.optim.known_optimizers import OPTIMIZERS
from library.optim.offloaded_states import HostMemory, OffloadedStates
from library.optim.optimizers import make_optimizer
from library.optim.options import KAHAN, STOCHASTIC, OptimizerOptions
from library.training.optimization import require_host_memory
from library.training.state import read_learnt, write_state
from tests.optim.test_every_optimizer import PROGRESS, Trained

KINDS = {kind.name: kind for kind in OPTIMIZERS}
CHOSEN = ["AdamW", "Adafactor", "AdamW8bit", "Lion", "AdamWScheduleFree", "Muon", "CAME"]


def states(trained: Trained) -> list[dict[str, Any]]:
    return [trained.optimizer.state[parameter] for parameter in trained.parameters]


def tensors(trained: Trained, of: list[Tensor] | None = None) -> list[Tensor]:
    """The entries that move: all of the state, or that of some parameters, but the count of steps."""
    each = [trained.optimizer.state[parameter] for parameter in of or trained.parameters]
    entries = [entry for state in each for entry in state.items()]
    return [value for key, value in entries if isinstance(value, Tensor) and key != "step"]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_same(one: Trained, other: Trained) -> None:
    assert one.equals(other)
    for state, expected in zip(states(one), states(other), strict=True):
        assert state.keys() == expected.keys()
        assert all(same(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16, "rounding": STOCHASTIC, "fused": True},
        {"dtype": torch.bfloat16, "rounding": KAHAN, "chunk": 1},
    ],
    ids=["float32", "stochastic, fused", "kahan, one by one"],
)
def test_weights_and_state_are_the_same_to_the_last_bit(name: str, settings: dict[str, Any]):
    pytest.importorskip(KINDS[name].module)
    usual, offloaded = Trained(KINDS[name], **settings), Trained(KINDS[name], **settings, offloads=True)
    assert usual.train(range(1, 5)) == offloaded.train(range(1, 5))
    assert_same(offloaded, usual)


def test_only_the_state_of_what_is_updated_has_left_its_place_in_host_memory(monkeypatch):
    trained = Trained(KINDS["AdamW"], torch.float32, fused=True, chunk=1, offloads=True)
    trained.train(range(1, 3))
    at_home = {value.data_ptr() for value in tensors(trained)}
    seen, fetched = [], []
    fetch, step = OffloadedStates.fetch, trained.optimizer.step

    def noting_fetch(self: OffloadedStates, parameters: list[Tensor]) -> None:
        fetched.append([id(parameter) for parameter in parameters])
        fetch(self, parameters)

    def noting_step() -> None:
        [group] = trained.optimizer.param_groups
        shown = {value.data_ptr() for value in tensors(trained, group["params"])}
        everywhere = {value.data_ptr() for value in tensors(trained)}
        assert not shown & at_home
        assert len(everywhere - at_home) == len(shown) == 2 * len(group["params"])
        seen.append([id(parameter) for parameter in group["params"]])
        step()

    monkeypatch.setattr(OffloadedStates, "fetch", noting_fetch)
    monkeypatch.setattr(trained.optimizer, "step", noting_step)
    trained.train(range(3, 4))
    assert {value.data_ptr() for value in tensors(trained)} == at_home, "always at the same place"
    assert len(seen) == len(trained.parameters)
    # The first is fetched when the step begins, each other one when the one before it is about to be updated.
    wanted = [names for names in fetched if names]
    assert wanted == [seen[0], *(names for pair in pairwise(seen) for names in pair), seen[-1]]


def test_a_weight_without_a_gradient_keeps_its_state():
    usual, offloaded = (Trained(KINDS["AdamW"], torch.float32, offloads=offloads) for offloads in (False, True))
    for trained in (usual, offloaded):
        trained.train(range(1, 3))
        trained.parameters[0].requires_grad_(False)
        trained.train(range(3, 4))
        trained.parameters[0].requires_grad_(True)
        trained.train(range(4, 6))
    assert_same(offloaded, usual)


@pytest.mark.parametrize("then", [False, True])
def test_a_state_continues_with_and_without_it(then: bool, tmp_path: Path):
    kind, dtype = KINDS["AdamW"], torch.bfloat16
    at_once = Trained(kind, dtype)
    at_once.train(range(1, 6))
    first = Trained(kind, dtype, offloads=then)
    first.train(range(1, 3))
    write_state(tmp_path / "m-state", PROGRESS, first.resumable)
    for now in (True, False):
        second = Trained(kind, dtype, offloads=now)
        read_learnt(tmp_path / "m-state", second.resumable)
        second.train(range(3, 6))
        assert_same(second, at_once)


def test_saving_writes_no_more_than_without_it(tmp_path: Path):
    for offloads in (False, True):
        trained = Trained(KINDS["AdamW"], torch.bfloat16, offloads=offloads)
        trained.train(range(1, 3))
        write_state(tmp_path / str(offloads), PROGRESS, trained.resumable)
    sizes = [(tmp_path / name / "optimizer.pt").stat().st_size for name in ("False", "True")]
    assert sizes[0] == sizes[1]


def test_a_schedule_free_optimizer_averages_chunk_by_chunk_and_returns(monkeypatch):
    kind = KINDS["AdamWScheduleFree"]
    pytest.importorskip(kind.module)
    usual, offloaded = (Trained(kind, torch.float32, offloads=offloads) for offloads in (False, True))
    for trained in (usual, offloaded):
        trained.train(range(1, 4))
    before = [parameter.detach().clone() for parameter in offloaded.parameters]
    fetch, fetched = OffloadedStates.fetch, []
    monkeypatch.setattr(OffloadedStates, "fetch", lambda self, some: fetched.append(some) or fetch(self, some))
    for name in ("eval", "train"):
        for trained in (usual, offloaded):
            trained.stepper.with_states(getattr(trained.optimizer, name))
        assert_same(offloaded, usual)
        moved = [not torch.equal(one, other) for one, other in zip(before, offloaded.parameters, strict=True)]
        assert any(moved) or name == "train"
    assert [group["train_mode"] for group in offloaded.optimizer.param_groups] == [True, True]
    assert len(fetched) == 2 * len(offloaded.stepper.chunks), "nothing but what is averaged"
    for trained in (usual, offloaded):
        trained.train(range(4, 6))
    assert_same(offloaded, usual)


def test_steps_in_another_order_are_the_same():
    usual, offloaded = (
        Trained(KINDS["AdamW"], torch.float32, chunk=1, offloads=offloads) for offloads in (False, True)
    )
    for trained in (usual, offloaded):
        trained.train(range(1, 3))
        trained.stepper.chunks.reverse()
        trained.train(range(3, 5))
        trained.stepper.chunks.append(trained.stepper.chunks.pop(2))
        trained.train(range(5, 7))
    assert_same(offloaded, usual)


def test_host_memory_is_taken_from_large_allocations_and_each_tensor_has_a_storage():
    memory = HostMemory(is_pinned=False)
    like = [torch.empty(3, 5), torch.empty(7, dtype=torch.uint8), torch.tensor(2.0, dtype=torch.bfloat16)]
    made = [memory.like(each) for each in (*like, torch.empty(0, 4), torch.empty(2**26 + 1))]
    for one, other in zip(made, like, strict=False):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.untyped_storage().nbytes() == other.nbytes
        assert one.data_ptr() % 64 == made[0].data_ptr() % 64
    assert made[1].data_ptr() - made[0].data_ptr() == 64
    assert made[4].numel() == 2**26 + 1, "more than one allocation holds"
    for place, each in enumerate(made):
        each.fill_(place)
    assert [set(each.flatten().tolist()) for each in made[:3]] == [{0.0}, {1}, {2.0}]


@pytest.mark.parametrize("name", ["Prodigy", "ProdigyPlusScheduleFree"])
@pytest.mark.parametrize("flag", ["offload_optimizer", "fused_backward_pass"])
def test_what_needs_all_at_once_is_refused_with_the_reason_before_anything_is_loaded(name: str, flag: str):
    pytest.importorskip(KINDS[name].module)
    [problem] = OptimizerOptions(name, learning_rate=1, **{flag: True}).heavy_problems()
    assert problem.startswith(f"--{flag} cannot work with {name}, which needs all ")
    assert list(OptimizerOptions("AdamW", **{flag: True}).heavy_problems()) == []


def test_paged_state_is_not_offloaded_too():
    [problem] = problems_of(OptimizerOptions("PagedAdamW8bit", offload_optimizer=True))
    assert "which pages its state by itself" in problem


def test_too_little_memory_is_named(monkeypatch):
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((512, 256), (64, 64, 3, 3))]
    make = partial(make_optimizer, options=OptimizerOptions())
    for free, is_enough in ((4 * 512 * 256 + 4 * 64 * 64 * 9 + 64, True), (2 * 512 * 256, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if is_enough:
            require_host_memory(make, weights, STOCHASTIC)
        else:
            with pytest.raises(UserError, match=r"keeps 0.0 GiB of state in memory, of which 0.0 GiB are free"):
                require_host_memory(make, weights, STOCHASTIC)
