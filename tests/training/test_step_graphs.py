"""Steps replayed as CUDA graphs: by a stand-in for a graph on the CPU, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import parse_options
from library.training import step_graphs
from library.training.graph_conflicts import graph_conflicts
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from library.training.step_comparison import StepComparison
from library.training.step_graphs import make_step_graphs
from tests.conftest import base_flags

ROOT = Path(__file__).parents[2]
FITTING = (
    *("--cuda_graphs", "--full_bf16", "--mixed_precision=bf16", "--fused_backward_pass", "--max_grad_norm=0"),
    "--optimizer_type=Adafactor",
)
GPU = torch.device("cuda", 0)


@pytest.mark.slow
def test_replayed_steps_are_the_usual_ones_bit_for_bit_and_what_is_old_is_noticed():
    pytest.importorskip("triton")
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("graphs_in_interpreter.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for said in (
        "replayed steps are the same bit for bit",
        "a loss that is not finite changes nothing in a replay",
        "old seeds, rates and batches are noticed",
        "shapes beyond the limit are stepped as usual",
        "what waits for the GPU cannot be captured",
    ):
        assert said in ended.stdout


@pytest.fixture
def problems_with(tmp_path: Path):
    """`problems_with(*flags)`: what is said of a run with these flags and CUDA graphs."""
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    usual = base_flags("some/model", tmp_path / "meta.json", tmp_path, tmp_path / "output")

    def problems(*flags: str, leave_out: str = "") -> list[str]:
        argv = [*usual, *(flag for flag in FITTING if not flag.startswith(leave_out or "-?")), *flags]
        options = TrainingOptions(*parse_options(OPTION_CLASSES, argv, description="", spellings=TRAINER_SPELLINGS))
        return list(graph_conflicts(options))

    return problems


def test_the_recipe_with_graphs_is_no_problem_nor_is_anything_without(problems_with):
    assert problems_with() == []
    assert problems_with("--optimizer_type=AdamW", leave_out="--cuda_graphs") == []


@pytest.mark.parametrize(
    ("flag", "leave_out", "reason"),
    [
        ("--optimizer_type=AdamW", "", "--cuda_graphs needs --optimizer_type=Adafactor: AdamW takes its numbers from"),
        ("--max_grad_norm=1", "", "--cuda_graphs needs --max_grad_norm=0: whether the norm is finite is read"),
        ("--seed=1", "--fused", "--cuda_graphs needs --fused_backward_pass: gradients that outlive"),
        ("--seed=1", "--full_bf16", "--cuda_graphs needs --full_bf16: autocast keeps copies"),
        ("--train_text_encoder", "", "--cuda_graphs cannot work with --train_text_encoder: only the U-Net's step"),
        ("--torch_compile", "", "--cuda_graphs cannot work with --torch_compile: "),
        ("--offload_optimizer", "", "--cuda_graphs cannot work with --offload_optimizer: its state moves"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_with_the_reason(flag, leave_out, reason, problems_with):
    [problem] = problems_with(flag, leave_out=leave_out)
    assert problem.startswith(reason)


def test_several_processes_are_refused(problems_with, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems_with() == [
        "--cuda_graphs cannot work with several processes, which exchange gradients within the backward pass."
    ]


@pytest.mark.parametrize(
    ("device", "decides", "has_triton", "reason"),
    [
        (torch.device("cpu"), True, True, "needs a GPU, and this run trains on the CPU"),
        (GPU, False, True, "needs an optimizer that decides on the GPU"),
        (GPU, True, False, "needs Triton, which cannot be used here"),
    ],
)
def test_a_machine_that_cannot_replay_is_told_so(device, decides, has_triton, reason, monkeypatch):
    monkeypatch.setattr(step_graphs.triton_launches, "has_triton", lambda: has_triton)
    stepper, accelerator = SimpleNamespace(decides_on_device=decides), SimpleNamespace(device=device)
    with pytest.raises(UserError, match=reason):
        make_step_graphs(lambda *_: None, object(), stepper, accelerator, is_exact=True)


def test_movements_that_differ_in_last_bits_are_the_same_step_unless_kernels_repeat():
    weight = torch.nn.Parameter(torch.zeros(10_000))
    states = {weight: {"step": 3, "means": torch.ones(7)}}
    comparison = StepComparison([weight], states)
    moved = torch.linspace(-1, 1, 10_000)
    assert not comparison.has_moved()
    weight.data += moved
    assert comparison.has_moved()
    states[weight]["means"] *= 2
    states[weight]["step"] = 4
    comparison.keep_and_put_back()
    assert not weight.any()
    assert states[weight]["step"] == 3
    weight.data += moved * 1.01
    states[weight]["means"] *= 2
    assert comparison.difference(is_exact=False) is None
    assert comparison.difference(is_exact=True) == "the weights, bit for bit"
    weight.data.copy_(moved.flip(0))
    assert comparison.difference(is_exact=False) == "the weights, by 200% of their movement"
