"""How much a run is going to save, known before it starts."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from library.config.errors import UserError
from library.optim.options import KAHAN, STOCHASTIC, OptimizerOptions
from library.training.disk_space import bytes_of, bytes_of_state, require_disk_for_saves
from library.training.saves import SaveOptions

Usage = namedtuple("Usage", "free")
WEIGHTS = 1000 * 1000


@pytest.fixture
def needs(tmp_path: Path, monkeypatch):
    """`needs(free, **options)`: whether a run of 10 steps, 5 an epoch, does not fit; a model of 100, a state of 300."""

    def check(free: int, steps: range = range(1, 11), snapshots: tuple[int, int | None] = (0, None), **options) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free))
        try:
            require_disk_for_saves(
                SaveOptions(output_dir=tmp_path, output_name="m", **options),
                model_bytes=100,
                state_bytes=300,
                steps=steps,
                steps_per_epoch=5,
                snapshot_bytes=snapshots[0],
                snapshot_every=snapshots[1],
            )
        except UserError:
            return True
        return False

    return check


@pytest.mark.parametrize(
    ("options", "bytes_needed"),
    [
        ({}, 100),
        ({"save_state_on_train_end": True}, 400),
        ({"save_every_n_steps": 2}, 5 * 100 + 100),
        ({"save_every_n_steps": 2, "save_last_n_steps": 2}, 3 * 100),
        ({"save_every_n_steps": 5, "save_state": True}, 3 * 400),
        ({"save_every_n_epochs": 1}, 200),
        ({"save_every_n_minutes": 10}, 2 * 400),
        ({"save_every_n_minutes": 10, "save_every_n_steps": 5, "save_state": True}, 4 * 400),
    ],
)
def test_all_that_is_kept_at_once_must_fit(options: dict, bytes_needed: int, needs):
    assert needs(bytes_needed - 1, **options)
    assert not needs(bytes_needed, **options)


def test_a_resumed_run_needs_room_for_the_rest(needs, tmp_path: Path):
    (tmp_path / "m-step00000002.safetensors").touch()
    assert not needs(300, steps=range(7, 11), save_every_n_steps=2)
    (tmp_path / "m-step00000004.safetensors").touch()
    # Two models are kept and lie there already: there is room for one more to be needed.
    assert not needs(100, steps=range(5, 11), save_every_n_steps=2, save_last_n_steps=2)
    assert needs(99, steps=range(5, 11), save_every_n_steps=2, save_last_n_steps=2)


def test_what_was_saved_on_request_or_by_the_clock_is_counted_as_what_it_is(needs, tmp_path: Path):
    (tmp_path / "m-step00000003.safetensors").touch()  # between two saves: it stays
    assert needs(299, save_every_n_steps=2, save_last_n_steps=2)
    (tmp_path / "m-recent.safetensors").touch()
    (tmp_path / "m-recent-state").mkdir()
    assert not needs(400, save_every_n_minutes=10)  # both are replaced
    assert needs(399, save_every_n_minutes=10)


def test_averages_beside_models_and_snapshots_are_counted(needs, tmp_path: Path):
    assert needs(100 + 3 * 50 - 1, snapshots=(50, 4))  # after steps 4, 8 and 10
    assert not needs(100 + 3 * 50, snapshots=(50, 4))
    assert not needs(100 + 2 * 50, snapshots=(50, 5))
    for name in ("m-step00000002.safetensors", "m-step00000002_ema.safetensors"):  # of one save
        (tmp_path / name).touch()
    assert needs(199, save_every_n_steps=2, save_last_n_steps=2)
    assert not needs(200, save_every_n_steps=2, save_last_n_steps=2)


def test_a_run_of_a_million_million_steps_is_answered_at_once(needs):
    assert needs(300, steps=range(1, 10**12), save_every_n_steps=1, save_last_n_steps=2)
    assert not needs(400, steps=range(1, 10**12), save_every_n_steps=1, save_last_n_steps=2)


@pytest.mark.parametrize(("name", "numbers_beside"), [("AdamW", 2), ("torch.optim.SGD", 0), ("Adafactor", 0)])
def test_a_state_is_as_large_as_weights_and_optimizer(name: str, numbers_beside: int):
    layer = nn.Linear(1000, 1000, bias=False)
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-3)
    if name == "Adafactor":
        options = OptimizerOptions(optimizer_type=name, learning_rate=1e-3, optimizer_args=["relative_step=False"])
    expected = 4 * WEIGHTS * (1 + numbers_beside)
    assert expected <= bytes_of_state(options, [layer]) <= 1.02 * expected  # Adafactor's rows and columns
    assert bytes_of([layer], torch.bfloat16) == 2 * WEIGHTS


def test_compensated_rounding_keeps_one_more_number_for_a_bfloat16_weight():
    options = OptimizerOptions(optimizer_type="torch.optim.SGD", learning_rate=1e-3)
    layer = nn.Linear(1000, 1000, bias=False)
    assert bytes_of_state(options, [layer], KAHAN) == 4 * WEIGHTS
    layer.to(torch.bfloat16)
    assert bytes_of_state(options, [layer], STOCHASTIC) == 2 * WEIGHTS
    assert bytes_of_state(options, [layer], KAHAN) == 4 * WEIGHTS
