"""Whole runs with each further optimizer: it trains the tiny model and resumes bit for bit. Minutes: --run_slow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.optim.known_optimizers import OPTIMIZERS

pytestmark = pytest.mark.slow
FURTHER = {
    **dict.fromkeys(("Muon", "CAME", "AdEMAMix", "StableAdamW", "AdEMAMix8bit", "PagedAdEMAMix8bit"), True),
    **dict.fromkeys(("PagedAdamW", "PagedAdamW8bit", "PagedLion8bit"), True),
    **dict.fromkeys(("ProdigyPlusScheduleFree", "DAdaptation", "DAdaptLion"), False),
}
"""Name, and whether it steps in the backward pass."""


@pytest.mark.parametrize("name", FURTHER)
def test_it_trains_the_tiny_model_and_resumes_bit_for_bit(name: str, train, tiny_sdxl: Path, tmp_path: Path):
    [kind] = [kind for kind in OPTIMIZERS if kind.name == name]
    pytest.importorskip(kind.module)
    rate = "1e-4" if FURTHER[name] else "1"
    flags = [
        *(f"--optimizer_type={name}", f"--learning_rate={rate}", "--mixed_precision=bf16", "--full_bf16"),
        *(["--fused_backward_pass"] if FURTHER[name] else ["--optimizer_args", "d0=1e-4"]),
    ]
    at_once = train(*flags, "--max_train_steps=3")
    output = f"--output_dir={tmp_path / 'output'}"
    train(*flags, output, "--max_train_steps=2", "--save_state_on_train_end")
    second = train(*flags, output, "--max_train_steps=3", "--resume=latest")
    resumed = replace(second, output=tmp_path / "output").weights()
    expected, start = at_once.weights(), load_file(tiny_sdxl)
    assert [key for key, value in expected.items() if not torch.equal(value, resumed[key])] == []
    moved = [key for key, value in expected.items() if not torch.equal(value, start[key].to(value.dtype))]
    assert len(moved) > 100, "weights of the U-Net"


def test_muon_leaves_the_embeddings_of_text_encoders_to_adamw(train):
    run = train("--optimizer_type=Muon", "--train_text_encoder", "--max_train_steps=1", "--save_state_on_train_end")
    state = torch.load(run.output / "m-state" / "optimizer.pt", weights_only=True)["state"]
    by_adamw = {tuple(each["exp_avg"].shape) for each in state if "exp_avg" in each}
    by_muon = {tuple(each["momentum_buffer"].shape) for each in state if "momentum_buffer" in each}
    tables = {shape for shape in by_adamw if len(shape) == 2}
    assert {rows for rows, _ in tables} == {49408, 77}, "tokens and positions"
    assert by_muon
    assert not by_muon & tables


def test_the_rates_that_adafactor_finds_are_logged_and_resumed(train, tmp_path: Path):
    flags = ("--optimizer_type=Adafactor", "--lr_scheduler=adafactor:1e-5", "--learning_rate=1")
    at_once = train(*flags)
    rates = at_once.logged("lr/unet")
    assert rates[0] == pytest.approx(1e-5), "before it has found one"
    # A hundredth of the size of the first weight, which is above the least of 0.001.
    assert all(1e-5 < rate < 1e-2 for rate in rates[1:])
    output = f"--output_dir={tmp_path / 'output'}"
    train(*flags, output, "--max_train_steps=2", "--save_state_on_train_end")
    resumed = train(*flags, output, "--resume=latest")
    assert resumed.logged("lr/unet")[-1] == rates[-1]
    weights, expected = replace(resumed, output=tmp_path / "output").weights(), at_once.weights()
    assert [key for key, value in expected.items() if not torch.equal(value, weights[key])] == []
