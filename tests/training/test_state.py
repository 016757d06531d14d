"""States: written, found again, read back exactly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.config.errors import UserError
from library.optim.lr_schedules import make_lr_schedule
from library.optim.options import ScheduleOptions
from library.training.progress import LATEST, Progress, Setting, find_state, read_progress
from library.training.state import Resumable, group_settings, read_learnt, write_state

PROGRESS = Progress("2026-02-03T04:05:06", 7, 3, 1, 1, [0.1, 1 / 3], Setting({"output_name": "m"}, {"01": "ab"}, {}))
OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adafactor": lambda groups: Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False),
}


def make(optimizer: Callable = OPTIMIZERS["AdamW"], dtype=torch.float32, rate: float = 0.1, width: int = 4):
    """A small network that has not learnt yet, always the same one."""
    torch.manual_seed(0)
    network = nn.Linear(width, 3, dtype=dtype)
    made = optimizer([{"name": "unet", "params": list(network.parameters()), "lr": rate}])
    settings = group_settings(made)
    schedule = make_lr_schedule(made, ScheduleOptions(lr_scheduler="linear"), 10)
    return Resumable({"unet": network}, made, settings, schedule)


def train(learnt: Resumable, steps: range) -> list[torch.Tensor]:
    """Some steps, each with its own input; gives the weights."""
    network = learnt.networks["unet"]
    for step in steps:
        inputs = torch.randn(2, network.in_features, generator=torch.Generator().manual_seed(step))
        network(inputs.to(network.weight.dtype)).pow(2).sum().backward()
        learnt.optimizer.step()
        learnt.lr_schedule.step()
        learnt.optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_read_back_learns_on_bit_for_bit(name: str, dtype, tmp_path: Path):
    at_once = train(make(OPTIMIZERS[name], dtype), range(6))
    first, second = make(OPTIMIZERS[name], dtype), make(OPTIMIZERS[name], dtype)
    train(first, range(3))
    write_state(tmp_path / "m-state", PROGRESS, first)
    read_learnt(tmp_path / "m-state", second)
    assert all(torch.equal(one, other) for one, other in zip(at_once, train(second, range(3, 6)), strict=True))


def test_where_the_run_was_is_read_back(tmp_path: Path):
    write_state(tmp_path / "m-state", PROGRESS, make())
    assert read_progress(tmp_path / "m-state") == PROGRESS


def test_another_learning_rate_holds_from_the_step_of_the_state(tmp_path: Path):
    first = make()
    train(first, range(4))
    write_state(tmp_path / "m-state", PROGRESS, first)
    second = make(rate=0.01)
    read_learnt(tmp_path / "m-state", second)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 6 / 10)  # linear, after 4 of 10 steps


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(width=5), "holds other weights"),
        (lambda: make(OPTIMIZERS["SGD"]), "belongs to another optimizer"),
    ],
    ids=["network", "optimizer"],
)
def test_a_state_of_something_else_is_refused(other: Callable, message: str, tmp_path: Path):
    write_state(tmp_path / "m-state", PROGRESS, make())
    with pytest.raises(UserError, match=message):
        read_learnt(tmp_path / "m-state", other())


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path):
    write_state(tmp_path / "m-state", PROGRESS, make())
    (tmp_path / "m-state" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_learnt(tmp_path / "m-state", make())
    with pytest.raises(UserError, match=f"{name} is cut short"):
        read_progress(tmp_path / "m-state")


def test_latest_is_the_newest_whole_state_of_this_run(tmp_path: Path, capsys):
    for name, step, run in (("a-state", 9, "m"), ("b-state", 4, "m"), ("c-state", 20, "other"), ("d-state", 30, "m")):
        write_state(tmp_path / name, replace(PROGRESS, step=step, setting=Setting({"output_name": run})), make())
    (tmp_path / "d-state" / "optimizer.pt").write_bytes(b"copied in part")
    (tmp_path / "e-state.123.partial").mkdir()
    (tmp_path / "f-state").mkdir()
    assert find_state(LATEST, tmp_path, "m") == tmp_path / "b-state"
    said = capsys.readouterr().err
    assert "d-state' is not a complete state" in said
    assert find_state(LATEST, tmp_path, "other") == tmp_path / "c-state"


def test_where_there_is_no_state_that_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="holds no complete state"):
        find_state(LATEST, tmp_path, "m")
    with pytest.raises(UserError, match="there is no folder"):
        find_state(str(tmp_path / "gone"), tmp_path, "m")


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"format": 99})])
def test_a_folder_of_another_kind_is_no_state(content: str, tmp_path: Path):
    (tmp_path / "progress.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a complete state"):
        read_progress(tmp_path)
