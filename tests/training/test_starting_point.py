"""Where a resumed run starts: at the newest state that is whole, with the seed and in the precision that it says."""

import json
from pathlib import Path

import pytest

import sdxl_train
from library.training.progress import read_progress
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator
from tests.outcome import differences, outcome_of
from tests.training.test_state import flip_bit

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def train_in(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path):
    """`train_in("folder", *flags)` returns the exit status of a run that saves a state after each of three steps."""

    def run(folder: str, *flags: str) -> int:
        forget_accelerator()
        return sdxl_train.main(
            [
                *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / folder),
                *("--output_name=m", "--max_train_steps=3", "--max_data_loader_n_workers=0", "--learning_rate=1e-3"),
                *("--save_every_n_steps=1", "--save_state", *BUCKET_FLAGS, *flags),
            ]
        )

    return run


def state(folder: Path, step: int) -> Path:
    return folder / f"m-step{step:08d}-state"


def test_latest_skips_damaged_states_by_name_and_comes_to_the_same(train_in, tmp_path: Path, capsys):
    assert train_in("run", "--seed=7") == 0
    whole = outcome_of(tmp_path / "run")
    damaged = [state(tmp_path / "run", 3), tmp_path / "run" / "m-state"]  # the last step and the end are one place
    flip_bit(damaged[0] / "weights.safetensors", 100_003)
    flip_bit(damaged[1] / "optimizer.pt", 200_001)
    capsys.readouterr()
    assert train_in("run", "--seed=7", "--resume=latest") == 0
    said = capsys.readouterr()
    for folder, name in zip(damaged, ("weights.safetensors", "optimizer.pt"), strict=True):
        assert f"'{folder}' is damaged: {name} is not as it was written. It is skipped." in said.err
    assert f"resuming after step 2 from '{state(tmp_path / 'run', 2)}'" in said.out
    assert differences(whole, outcome_of(tmp_path / "run")) == []
    assert read_progress(tmp_path / "run" / "m-state").num_states == 6  # four, and two again


def test_a_damaged_state_that_is_named_is_refused(train_in, tmp_path: Path, capsys):
    assert train_in("run", "--max_train_steps=1") == 0
    flip_bit(state(tmp_path / "run", 1) / "optimizer.pt", 200_001)
    assert train_in("run", f"--resume={state(tmp_path / 'run', 1)}") == 2
    assert "is damaged: optimizer.pt is not as it was written. Resume from an older state" in capsys.readouterr().err


@pytest.mark.slow  # five runs
def test_the_seed_that_is_announced_is_trained_with(train_in, tmp_path: Path, capsys):
    assert train_in("old seed", "--max_train_steps=1", "--seed=7") == 0
    again = f"--resume={state(tmp_path / 'old seed', 1)}"
    capsys.readouterr()
    assert train_in("old seed", again, "--seed=99") == 2
    assert "--seed: 7 then, 99 now" in capsys.readouterr().err
    assert train_in("new seed", again, "--seed=99", "--resume_anyway") == 0
    said = capsys.readouterr().out
    assert "--seed: 7 then, 99 now" in said
    assert "seed 99" in said
    assert read_progress(state(tmp_path / "new seed", 2)).seed == 99
    assert train_in("not given", again) == 0
    said = capsys.readouterr().out
    assert "--seed" not in said
    assert "seed 7" in said
    weights = [outcome_of(tmp_path / folder)["model m"] for folder in ("new seed", "not given")]
    assert any(not one.equal(weights[1][name]) for name, one in weights[0].items())


@pytest.mark.slow
def test_a_seed_that_was_drawn_is_no_change_when_it_is_given(train_in, tmp_path: Path, capsys):
    assert train_in("run", "--max_train_steps=1") == 0
    progress = json.loads((state(tmp_path / "run", 1) / "progress.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert train_in("run", "--resume=latest", f"--seed={progress['seed']}") == 0
    assert "--seed" not in capsys.readouterr().out


NARROW = ("--mixed_precision=bf16", "--full_bf16")


@pytest.mark.slow  # three runs each
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("is_narrow_first", [True, False], ids=["to float32", "to bfloat16"])
def test_a_state_of_adamw_in_another_precision_is_continued(train_in, rounding, is_narrow_first, tmp_path, capsys):
    narrow = (*NARROW, f"--bf16_rounding={rounding}")
    first, second = (narrow, ()) if is_narrow_first else ((), narrow)
    assert train_in("run", "--max_train_steps=1", *first) == 0
    assert train_in("run", "--resume=latest", *second) == 2
    assert "--full_bf16" in capsys.readouterr().err
    assert train_in("run", "--resume=latest", "--resume_anyway", *second) == 0
