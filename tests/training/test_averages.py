"""The averages of a run: when they are updated, what a state holds of them, snapshots on disk."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from library.config.errors import UserError
from library.optim.ema_options import EmaOptions
from library.training.averages import Averages
from library.training.ema_snapshots import SnapshotRecord, find_snapshots, snapshot_path, write_snapshot
from library.training.learner import StepReport
from library.training.plan import Occasion
from tests import forked_runs

BOTH = EmaOptions(ema=True, ema_snapshot_every_n_steps=4)
REPORT = StepReport(0.1, {}, None)


def make(options: EmaOptions = BOTH, width: int = 4) -> tuple[Averages, nn.Module]:
    """Averages of a layer of which the bias is not trained."""
    torch.manual_seed(0)
    network = nn.Linear(width, 3)
    averages = Averages(options, {"unet": network}, [network.weight], device=torch.device("cpu"), seed=7)
    return averages, network


def run(averages: Averages, network: nn.Module, steps: range, last: int = 100) -> None:
    for step in steps:
        with torch.no_grad():
            network.weight += torch.randn(network.weight.shape, generator=torch.Generator().manual_seed(step))
        averages.after_step(Occasion(step, is_last=step == last), REPORT)


def of(averages: Averages) -> list[torch.Tensor]:
    return [tensor for name in averages.state_dict()["averages"] for tensor in averages.tensors(name).values()]


def test_only_what_is_trained_is_averaged_and_replaces_the_weights_of_a_saved_model():
    averages, network = make()
    averages.begin(0)
    run(averages, network, range(1, 4))
    assert list(averages.tensors("ema")) == ["unet.weight"]
    assert averages.replacing(network, "weight") is averages.tensors("ema")["unet.weight"]
    assert averages.replacing(network, "bias") is None
    assert averages.replacing(nn.Linear(1, 1), "weight") is None
    assert list(averages.weight_sets()) == ["ema"]
    assert make(EmaOptions())[0].weight_sets() == {}


def test_updates_are_due_every_nth_step_before_a_snapshot_and_at_the_end():
    averages, network = make(EmaOptions(ema=True, ema_every=3, ema_snapshot_every_n_steps=4))
    averages.begin(0)
    saved: list[int] = []
    averages.on_snapshot = saved.append
    updated = []
    for step in range(1, 11):
        run(averages, network, range(step, step + 1), last=10)
        updated.append(averages.state_dict()["averages"]["ema"]["step"])
    assert updated == [0, 0, 3, 4, 4, 6, 6, 8, 9, 10]
    assert saved == [4, 8, 10]
    averages.after_step(Occasion(10, is_last=True, is_resumed=True), None)  # a run that is resumed at its end
    assert saved == [4, 8, 10]


@pytest.mark.parametrize("precision", ["float", "bf16"])
def test_a_resumed_average_goes_on_bit_for_bit(precision: str):
    options = EmaOptions(ema=True, ema_snapshot_every_n_steps=4, ema_precision=precision, ema_every=2)
    (at_once, network), (first, same), (second, _) = make(options), make(options), make(options)
    for each in (at_once, first):
        each.begin(0)
    run(at_once, network, range(1, 10))
    run(first, same, range(1, 6))
    second, resumed = make(options)
    resumed.load_state_dict(same.state_dict())
    second.load_state_dict(first.state_dict())
    second.begin(5)
    run(second, resumed, range(6, 10))
    assert all(torch.equal(one, other) for one, other in zip(of(at_once), of(second), strict=True))


def test_averages_that_a_state_lacks_begin_with_its_weights_and_others_end_and_both_are_named(caplog):
    earlier, network = make(EmaOptions(ema=True))
    earlier.begin(0)
    run(earlier, network, range(1, 6))
    later, _ = make(EmaOptions(ema_snapshot_every_n_steps=4))
    later.load_state_dict(earlier.state_dict())
    later.begin(5)
    assert later.begun("sigma0.050") == 5
    assert "no average sigma0.050, sigma0.100: it begins with the weights of the state" in caplog.text
    assert "the average ema of the state is not continued" in caplog.text
    with pytest.raises(ValueError, match="an average of the shape"):
        make(width=5)[0].load_state_dict(earlier.state_dict())


def test_a_network_that_is_frozen_is_averaged_on_towards_the_weights_that_it_keeps():
    averages, network = make(EmaOptions(ema=True, ema_decay=0.5))
    averages.begin(0)
    run(averages, network, range(1, 6))
    network.requires_grad_(False)
    kept = network.weight.detach().clone()
    far = float((averages.tensors("ema")["unet.weight"] - kept).abs().max())
    for step in range(6, 16):
        averages.after_step(Occasion(step), REPORT)
    assert float((averages.tensors("ema")["unet.weight"] - kept).abs().max()) < far / 500


# -- snapshots --------------------------------------------------------------------------------------------------------


def snapshot(folder: Path, step: int = 4, sigma_rel: float = 0.05, run: str = "a run") -> Path:
    path = snapshot_path(folder, "m", step, sigma_rel)
    record = SnapshotRecord(run, step, step, sigma_rel, "base.safetensors", {"modelspec.title": "m"})
    write_snapshot(path, record, {"unet.weight": torch.randn(30, 20), "unet.bias": torch.randn(3)})
    return path


def test_snapshots_are_found_by_step_and_length(tmp_path: Path):
    for step in (8, 4):
        for width in (0.1, 0.05):
            snapshot(tmp_path, step, width)
    found = find_snapshots(tmp_path)
    assert [(each.record.step, each.record.sigma_rel) for each in found] == [(4, 0.05), (4, 0.1), (8, 0.05), (8, 0.1)]
    for each in found:
        each.require_whole()
    assert found[0].path.name == "m-step00000004-sigma0.050.safetensors"


def test_a_snapshot_with_one_flipped_bit_or_of_another_length_or_missing_is_named(tmp_path: Path):
    path = snapshot(tmp_path)
    [found] = find_snapshots(tmp_path)
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 20):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"sigma0.050.safetensors' is damaged"):
            found.require_whole()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is damaged"):
        found.require_whole()
    path.unlink()
    with pytest.raises(UserError, match="is missing; its record is there"):
        found.require_whole()


@pytest.mark.parametrize("damage", ["", "[]", '{"record": {}, "digest": ""}', None])
def test_a_damaged_record_is_named(damage: str | None, tmp_path: Path):
    path = snapshot(tmp_path).with_suffix(".json")
    if damage is None:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["record"]["sigma_rel"] = 0.06
        damage = json.dumps(content)
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=r"sigma0.050.json' is not the record of a snapshot"):
        find_snapshots(tmp_path)


def test_of_several_runs_one_has_to_be_named(tmp_path: Path, caplog):
    snapshot(tmp_path, 4, run="one run")
    snapshot(tmp_path, 8, run="another run")
    with pytest.raises(UserError, match=r"snapshots of 2 runs: 'another run', 'one run'"):
        find_snapshots(tmp_path)
    assert [each.record.step for each in find_snapshots(tmp_path, "another run")] == [8]
    with pytest.raises(UserError, match="holds no snapshots of 'a third'"):
        find_snapshots(tmp_path, "a third")
    snapshot_path(tmp_path, "m", 8, 0.05).with_suffix(".json").unlink()
    assert len(find_snapshots(tmp_path)) == 1
    assert "no record beside 'm-step00000008-sigma0.050.safetensors'; not used" in caplog.text


def test_where_there_are_none_that_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="holds no snapshots"):
        find_snapshots(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        find_snapshots(tmp_path / "gone")


def test_a_kill_at_any_moment_of_a_write_leaves_whole_snapshots_and_the_next_write_ends_it(tmp_path: Path):
    path = snapshot_path(tmp_path, "m", 4, 0.1)
    before = snapshot_path(tmp_path, "m", 2, 0.1)
    record = SnapshotRecord("run", 4, 4, 0.1, "model", {}, {})
    tensors = {"unet.weight": torch.arange(12.0).view(3, 4)}
    write_snapshot(before, replace(record, step=2), tensors)
    number, statuses = 0, []
    while not statuses or statuses[-1] != 0:
        number += 1
        statuses.append(_killed_at(number, tmp_path, lambda: write_snapshot(path, record, tensors)))
        found = find_snapshots(tmp_path)
        for snapshot in found:
            snapshot.require_whole()
        assert [snapshot.record.step for snapshot in found] in ([2], [2, 4])
        assert path.is_file() or not path.with_suffix(".json").is_file()
    assert len(statuses) > 4  # a file and its record, each written beside and renamed
    assert [snapshot.record.step for snapshot in find_snapshots(tmp_path)] == [2, 4]


def _killed_at(number: int, folder: Path, write: Callable[[], None]) -> int:
    """The exit status of a process that writes and is killed just before its n-th file operation in the folder."""
    process = os.fork()
    if process == 0:
        forked_runs._kill_at(number, str(folder))
        write()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
