"""States: written, found again, read back exactly."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.config.digests import file_digest
from library.config.errors import UserError
from library.optim.lr_schedules import make_lr_schedule
from library.optim.schedule_options import ScheduleOptions
from library.training.progress import (
    BY_IMAGE,
    BY_STEP,
    FORMAT_WITHOUT_DIGESTS,
    LATEST,
    PROGRESS_FILE,
    Progress,
    Setting,
    StateRecord,
    find_state,
    num_states,
    read_progress,
)
from library.training.resumable import Resumable, group_settings
from library.training.state import read_learnt, write_state

PROGRESS = Progress(
    "2026-02-03T04:05:06", 7, 3, 1, 1, [0.1, 1 / 3], setting=Setting({"output_name": "m"}, {"01": "ab"}, {})
)
LINEAR = ScheduleOptions(lr_scheduler="linear")
OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adafactor": lambda groups: Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False),
}


def make(
    optimizer: Callable = OPTIMIZERS["AdamW"], dtype=torch.float32, rate: float = 0.1, width: int = 4, scheduled=LINEAR
):
    """A small network that has not learnt yet, always the same one."""
    torch.manual_seed(0)
    network = nn.Linear(width, 3, dtype=dtype)
    made = optimizer([{"name": "unet", "params": list(network.parameters()), "lr": rate}])
    settings = group_settings(made)
    schedule = make_lr_schedule(made, scheduled, 10)
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


def test_a_state_keeps_the_rule_of_its_noise_and_one_from_before_has_its_own(tmp_path: Path):
    file = tmp_path / "progress.json"
    for rule in (BY_STEP, BY_IMAGE):
        file.write_text(StateRecord(replace(PROGRESS, noise_by=rule), {}, {}).as_text(), encoding="utf-8")
        assert read_progress(tmp_path).noise_by == rule
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["digest"], content["noise_by"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert read_progress(tmp_path).noise_by == BY_STEP
    file.write_text(json.dumps(content | {"noise_by": "weather"}), encoding="utf-8")
    with pytest.raises(UserError, match="noise is drawn by weather, which this version does not know"):
        read_progress(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_read_back_learns_on_bit_for_bit(name: str, dtype, tmp_path: Path):
    at_once = train(make(OPTIMIZERS[name], dtype), range(6))
    first, second = make(OPTIMIZERS[name], dtype), make(OPTIMIZERS[name], dtype)
    train(first, range(3))
    write_state(tmp_path / "m-state", PROGRESS, first)
    read_learnt(tmp_path / "m-state", second)
    assert all(torch.equal(one, other) for one, other in zip(at_once, train(second, range(3, 6)), strict=True))


def by_class(name: str, *arguments: str) -> ScheduleOptions:
    return ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=list(arguments))


SCHEDULES = [
    ScheduleOptions("rex", lr_warmup_steps=2),
    by_class("OneCycleLR", "max_lr=0.2", "total_steps=10"),
    by_class("CosineAnnealingLR", "T_max=10"),
    by_class("MultiStepLR", "milestones=2,4"),
    by_class("CyclicLR", "base_lr=0.1", "max_lr=0.2", "step_size_up=3", "cycle_momentum=False"),
]


@pytest.mark.parametrize("scheduled", SCHEDULES, ids=lambda each: each.lr_scheduler_type or each.lr_scheduler)
def test_every_kind_of_schedule_continues_bit_for_bit(scheduled: ScheduleOptions, tmp_path: Path):
    at_once = train(make(scheduled=scheduled), range(6))
    first, second = make(scheduled=scheduled), make(scheduled=scheduled)
    train(first, range(3))
    write_state(tmp_path / "m-state", PROGRESS, first)
    read_learnt(tmp_path / "m-state", second)
    settings = [learnt.optimizer.param_groups[0] for learnt in (first, second)]
    assert {**settings[0], "params": None} == {**settings[1], "params": None}
    assert all(torch.equal(one, other) for one, other in zip(at_once, train(second, range(3, 6)), strict=True))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (by_class("CosineAnnealingLR", "T_max=10"), LINEAR),
        (LINEAR, by_class("CosineAnnealingLR", "T_max=10")),
        (by_class("CosineAnnealingLR", "T_max=10"), by_class("CosineAnnealingLR", "T_max=9")),
        (by_class("CosineAnnealingLR", "T_max=10"), by_class("ExponentialLR", "gamma=0.9")),
    ],
    ids=lambda each: each.lr_scheduler_type or each.lr_scheduler,
)
def test_a_schedule_by_its_class_is_not_exchanged_on_the_way(then, now, tmp_path: Path):
    write_state(tmp_path / "m-state", PROGRESS, make(scheduled=then))
    with pytest.raises(UserError, match="the state was saved under"):
        read_learnt(tmp_path / "m-state", make(scheduled=now))


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
    of_class = by_class("CosineAnnealingLR", "T_max=10")
    write_state(tmp_path / "class-state", PROGRESS, make(scheduled=of_class))
    with pytest.raises(UserError, match="with another learning rate"):
        read_learnt(tmp_path / "class-state", make(rate=0.01, scheduled=of_class))


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
    for read in (lambda: read_progress(tmp_path / "m-state"), lambda: read_learnt(tmp_path / "m-state", make())):
        with pytest.raises(UserError, match=f"{name} is cut short"):
            read()


def trained_state(folder: Path, **optimizer) -> Path:
    learnt = make(**optimizer)
    train(learnt, range(3))
    write_state(folder, PROGRESS, learnt)
    return folder


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "progress.json"])
def test_one_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path):
    path = trained_state(tmp_path / "m-state") / name
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 60):
        flip_bit(path, bit)
        with pytest.raises(UserError, match=r"m-state' is damaged|m-state' is not a complete state"):
            read_learnt(path.parent, make())
        path.write_bytes(whole)
    read_learnt(path.parent, make())


def as_before_digests(folder: Path, *, written: str = "2026-01-01T00:00:00+00:00") -> None:
    """Write the progress file of a state as earlier versions of this program did."""
    content = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    for key in ("digest", "digests", "num_states"):
        del content[key]
    (folder / "progress.json").write_text(json.dumps(content | {"format": 1, "written": written}), encoding="utf-8")


def test_a_state_without_digests_is_read_and_learns_on_bit_for_bit(tmp_path: Path):
    at_once = train(make(), range(6))
    as_before_digests(trained_state(tmp_path / "m-state"))
    second = make()
    read_learnt(tmp_path / "m-state", second)
    assert all(torch.equal(one, other) for one, other in zip(at_once, train(second, range(3, 6)), strict=True))


def test_a_digest_is_that_of_the_files_bytes(tmp_path: Path):
    folder = trained_state(tmp_path / "m-state", width=300_000)  # pieces of more than one read
    digests = json.loads((folder / "progress.json").read_text(encoding="utf-8"))["digests"]
    assert digests == {name: file_digest(folder / name) for name in ("weights.safetensors", "optimizer.pt")}
    read_learnt(folder, make(width=300_000))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_precision_learns_on_as_the_optimizer_keeps_it_there(name: str, saved, tmp_path: Path):
    now = torch.float32 if saved == torch.bfloat16 else torch.bfloat16
    fresh, resumed = make(OPTIMIZERS[name], now), make(OPTIMIZERS[name], now)
    train(fresh, range(1))
    narrow = torch.bfloat16 if now == torch.bfloat16 and name != "Adafactor" else torch.float32
    kept = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer"}) if narrow == torch.bfloat16 else frozenset()
    trained_state(tmp_path / "m-state", optimizer=OPTIMIZERS[name], dtype=saved)
    read_learnt(tmp_path / "m-state", replace(resumed, narrow_keys=kept))
    types = [
        [{key: value.dtype for key, value in state.items() if isinstance(value, torch.Tensor)} for state in states]
        for states in (fresh.optimizer.state.values(), resumed.optimizer.state.values())
    ]
    assert types[0] == types[1]
    assert all(weights.isfinite().all() for weights in train(resumed, range(3, 6)))


def with_others(**sizes: int) -> Resumable:
    """What learns, with other things that change beside it: layers of these sizes, already trained."""
    torch.manual_seed(1)
    return replace(make(), others={name: nn.Linear(size, 2) for name, size in sizes.items()})


def test_what_else_changes_is_saved_and_read_back_bit_for_bit(tmp_path: Path):
    saved, read = with_others(ema=3, loss_weights=5), with_others(loss_weights=5, ema=3)
    write_state(tmp_path / "m-state", PROGRESS, saved)
    read_learnt(tmp_path / "m-state", read)
    for name, other in saved.others.items():
        assert all(torch.equal(*pair) for pair in zip(other.parameters(), read.others[name].parameters(), strict=True))


def test_damage_to_what_else_a_state_holds_is_noticed(tmp_path: Path):
    write_state(tmp_path / "m-state", PROGRESS, with_others(ema=300))
    path = tmp_path / "m-state" / "ema.pt"
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 20):
        flip_bit(path, bit)
        with pytest.raises(UserError, match=r"m-state' is damaged: ema.pt is not as it was written"):
            read_learnt(path.parent, with_others(ema=300))
        flip_bit(path, bit)
    with pytest.raises(UserError, match=r"ema.pt' does not belong to this run \(Error\(s\) in loading"):
        read_learnt(path.parent, with_others(ema=3))


def test_what_a_state_lacks_begins_and_what_it_has_too_much_ends_and_both_are_named(tmp_path: Path, caplog):
    write_state(tmp_path / "m-state", PROGRESS, with_others(ema=3))
    other = with_others(loss_weights=5)
    before = other.others["loss_weights"].weight.detach().clone()
    read_learnt(tmp_path / "m-state", other)
    assert torch.equal(other.others["loss_weights"].weight, before)
    assert f"'{tmp_path / 'm-state'}' holds no loss_weights.pt" in caplog.text
    assert f"'{tmp_path / 'm-state' / 'ema.pt'}' is not continued by this run" in caplog.text


def test_latest_is_the_newest_whole_state_of_this_run(tmp_path: Path, capsys):
    for name, step, run in (("a-state", 3, "m"), ("b-state", 4, "m"), ("c-state", 20, "other"), ("d-state", 30, "m")):
        write_state(tmp_path / name, replace(PROGRESS, step=step, setting=Setting({"output_name": run})), make())
    (tmp_path / "d-state" / "optimizer.pt").write_bytes(b"copied in part")
    (tmp_path / "e-state.123.partial").mkdir()
    (tmp_path / "f-state").mkdir()
    assert find_state(LATEST, tmp_path, "m") == tmp_path / "b-state"
    said = capsys.readouterr().err
    assert "d-state' is not a complete state" in said
    assert find_state(LATEST, tmp_path, "other") == tmp_path / "c-state"
    assert find_state(LATEST, tmp_path, "m", [tmp_path / "b-state"]) == tmp_path / "a-state"
    with pytest.raises(UserError, match=r"every state of this run is damaged: '.*a-state', '.*b-state'"):
        find_state(LATEST, tmp_path, "m", [tmp_path / "a-state", tmp_path / "b-state"])


NEW = {"num_states": 5, "started": "2026-01-01T00:00:00", "step": 10}


@pytest.mark.parametrize(
    ("older", "old_version"),
    [
        ({**NEW, "num_states": 4, "step": 9}, False),
        ({**NEW, "num_states": 4, "started": "2027-01-01T00:00:00", "step": 500}, False),  # begun by a clock set back
        ({**NEW, "num_states": 0, "started": "2027-01-01T00:00:00", "step": 500}, True),
        ({**NEW, "num_states": 0, "step": 9}, True),
    ],
    ids=["an earlier step", "another run before it", "another run of an earlier version", "an earlier version"],
)
def test_latest_trusts_no_clock(older: dict, old_version: bool, tmp_path: Path):
    for name, place in (("older", older), ("newer", NEW)):
        write_state(tmp_path / f"{name}-state", replace(PROGRESS, **place), make())
    if old_version:
        as_before_digests(tmp_path / "older-state", written="2030-01-01T00:00:00+00:00")
    os.utime(tmp_path / "older-state" / "progress.json", (2e9, 2e9))
    assert find_state(LATEST, tmp_path, "m") == tmp_path / "newer-state"
    assert num_states(tmp_path, "m") == 5


def test_of_one_run_of_an_earlier_version_the_latest_is_the_last_step_whatever_the_clock_said(tmp_path: Path):
    for step, written in ((3, "2026-05-05T00:00:00+00:00"), (4, "2025-01-01T00:00:00+00:00")):
        write_state(tmp_path / f"{step}-state", replace(PROGRESS, step=step), make())
        as_before_digests(tmp_path / f"{step}-state", written=written)
    assert find_state(LATEST, tmp_path, "m") == tmp_path / "4-state"


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


# -- optimizers that another program wrote ----------------------------------------------------------------------------


def of_an_earlier_version(folder: Path, content: object) -> None:
    """Put another optimizer into a state, and make it one of those that have no digests."""
    torch.save(content, folder / "optimizer.pt")
    record = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    record = {key: value for key, value in record.items() if key not in ("digest", "digests")}
    record |= {"format": FORMAT_WITHOUT_DIGESTS, "bytes": {}}
    (folder / PROGRESS_FILE).write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("state", 0, "exp_avg"), torch.zeros(7, 7)),
        (("state", 1, "exp_avg_sq"), torch.zeros(())),
        (("state", 0), None),
        (("state", 0), [1]),
        (("groups", 0), 5),
        (("groups",), []),
        (("settings",), None),
        (("settings", 0), "a"),
        (("lr_schedule",), 10**12),
        (("lr_schedule", "last_epoch"), "a"),
        (("kind",), None),
        (("state",), 5),
    ],
    ids=lambda each: "-".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_an_optimizer_of_another_shape_or_kind_is_refused(place: tuple, value: object, tmp_path: Path):
    folder = tmp_path / "m-state"
    learnt = make()
    train(learnt, range(2))
    write_state(folder, PROGRESS, learnt)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    of_an_earlier_version(folder, content)
    read_learnt(folder, make())  # as it was it is read

    *outer, last = place
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    of_an_earlier_version(folder, content)
    with pytest.raises(UserError, match="m-state"):
        read_learnt(folder, make())
