"""Several processes train as one: to the same bits where sums of two are concerned."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.conftest import PreparedSet
from tests.outcome import differences
from tests.reliability import in_ranks
from tests.reliability.conftest import LIMIT_OF_BFLOAT16, Runs

pytestmark = pytest.mark.trains

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def two_are_one(runs: Runs, *flags: str) -> None:
    runs.run("one", 1, *flags, "--gradient_accumulation_steps=2")
    runs.run("two", 2, *flags)
    assert differences(runs.outcome("one"), runs.outcome("two")) == []


SGD = ("--optimizer_type=torch.optim.SGD",)
NOISE = (
    *("--noise_offset=0.1", "--noise_offset_random_strength", "--multires_noise_iterations=4", "--ip_noise_gamma=0.1"),
    *("--ip_noise_gamma_random_strength", "--stratified_timesteps"),
)


def test_two_processes_train_as_one_that_accumulates_bit_for_bit(runs: Runs):
    two_are_one(runs, *SGD, *NOISE)


def test_the_fused_backward_pass_of_two_processes_is_bit_for_bit_that_of_ddp(together):
    together(2, in_ranks.fused_as_ddp)


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_moves_nothing_in_any(together):
    together(2, in_ranks.not_a_number_in_one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*SGD, "--ddp_gradient_as_bucket_view", "--ddp_static_graph"),
        ("--optimizer_type=AdamW", "--max_grad_norm=0.05", "--ema", "--lr_scheduler=cosine", "--train_text_encoder"),
        (
            *("--mixed_precision=bf16", "--full_bf16", "--optimizer_type=Adafactor", "--optimizer_args"),
            *("scale_parameter=False", "relative_step=False", "warmup_init=False", "--learning_rate=1e-3"),
        ),
    ],
    ids=["flags of DDP", "clipping, EMA, text encoders", "bfloat16"],
)
def test_more_ways_to_train_in_two_processes_bit_for_bit(flags, runs: Runs):
    two_are_one(runs, *flags)


@pytest.mark.slow
def test_the_fused_backward_pass_saves_the_same_model_in_two_processes(runs: Runs):
    flags = ("--optimizer_type=AdamW", "--learning_rate=1e-3", "--max_grad_norm=0.05")
    runs.run("usual", 2, *flags)
    runs.run("fused", 2, *flags, "--fused_backward_pass")
    assert differences(runs.outcome("usual"), runs.outcome("fused")) == []


ADAM = ("--optimizer_type=AdamW", "--learning_rate=1e-3", "--optimizer_args", "eps=1e-6")
WAYS_OF_THREE = {
    "plain": SGD,
    "all": (*ADAM, "--max_grad_norm=0.05", "--ema", "--lr_scheduler=cosine", "--train_text_encoder"),
    "accumulated": (*ADAM, "--gradient_accumulation_steps=2", "--offload_optimizer"),
    "fused": (*ADAM, "--fused_backward_pass", "--max_grad_norm=0.05"),
    "bfloat16": (*ADAM, "--mixed_precision=bf16", "--full_bf16", "--max_grad_norm=0.05"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_OF_THREE)
def test_three_processes_train_as_one_but_for_the_order_of_sums(way: str, runs: Runs, tiny_sdxl: Path):
    alone = [flag for flag in WAYS_OF_THREE[way] if flag != "--fused_backward_pass"]  # which cannot accumulate
    runs.run("one", 1, *alone, f"--gradient_accumulation_steps={6 if way == 'accumulated' else 3}")
    runs.run("three", 3, *WAYS_OF_THREE[way])
    assert runs.distance("one", "three", tiny_sdxl) < (LIMIT_OF_BFLOAT16 if way == "bfloat16" else 2e-5)


@pytest.mark.slow
def test_processes_with_other_options_are_named_by_one_of_them_before_the_model_is_opened(
    runs: Runs, run_server, free_port
):
    shared = {"WORLD_SIZE": "2", "PORT": str(free_port()), "END_AT_ONCE": "1"}
    argv = [*runs.argv, f"--output_dir={runs.folder}"]
    pair = [
        run_server("train", [*argv, f"--noise_offset={offset}"], RANK=rank, LOCAL_RANK=rank, **shared)
        for rank, offset in (("0", "0.1"), ("1", "0.2"))
    ]
    assert [each.wait(timeout=600) for each in pair] == [2, 2]
    expected = "different options: process 0 and 1 differ in noise_offset (0.1 and 0.2)."
    assert [expected in each.said for each in pair] == [True, False]
    assert not any("Traceback" in each.said for each in pair)


ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes=2")
TORCH = ("torch.distributed.run", "--nproc_per_node=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "environment", "trains", "said"),
    [
        (ACCELERATE, {}, True, "training in one process on cpu"),
        (ACCELERATE, FSDP, False, "configured for FSDP, and one process has nobody to share weights with"),
        (TORCH, {"ACCELERATE_USE_CPU": "true"}, True, "training in 2 processes on cpu (DDP, gloo)"),
        (TORCH, {"ACCELERATE_USE_CPU": "true", **FSDP}, True, "training in 2 processes on cpu (FSDP2, gloo)"),
    ],
    ids=["accelerate", "accelerate, FSDP", "torchrun", "torchrun, FSDP"],
)
def test_what_a_launcher_starts_is_said_and_nothing_else_in_its_place(
    launcher: tuple[str, ...], environment: dict[str, str], trains: bool, said: str, runs: Runs, free_port
):
    flags = f"--output_dir={runs.folder / 'output'}", "--max_train_steps=1"
    port = f"--main_process_port={free_port()}" if launcher == ACCELERATE else f"--master_port={free_port()}"
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, port, "sdxl_train.py", *runs.argv, *flags],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert (ended.returncode == 0) == trains, ended.stderr
    assert (ended.stdout + ended.stderr).count(said) == 1, ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, FSDP], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("other", ["images", "versions"])
def test_processes_that_find_other_images_or_libraries_are_named_by_one_of_them(
    other: str, engine: dict[str, str], runs: Runs, prepared_set: PreparedSet, run_server, free_port
):
    for rank in "01":
        shutil.copytree(prepared_set.folder, runs.folder / rank)
    if other == "images":
        caption = runs.folder / "1" / "images" / "coffee.txt"
        metadata = runs.folder / "1" / "meta_lat.json"
        text = caption.read_text(encoding="utf-8")
        metadata.write_text(metadata.read_text(encoding="utf-8").replace(text, "another"), encoding="utf-8")
    paths = "--in_json=meta_lat.json", "--train_data_dir=images", f"--output_dir={runs.folder / 'output'}"
    shared = {**engine, "WORLD_SIZE": "2", "PORT": str(free_port())}
    argv = ["tests.reliability.in_ranks:train_in_folder", str(runs.folder), *runs.argv, *paths]
    pair = [
        run_server("call", argv, RANK=str(rank), LOCAL_RANK=str(rank), **shared, **release)
        for rank, release in enumerate([{}, {"RELEASE_OF_TORCH": "1.0"} if other == "versions" else {}])
    ]
    assert [each.wait(timeout=600) for each in pair] == [2, 2], [each.said for each in pair]
    named = "coffee" if other == "images" else f"torch ({version('torch')} and 1.0)"
    expected = f"different {other}: process 0 and 1 differ in {named}"
    assert [expected in each.said for each in pair] == [True, False], pair[0].said
    assert not any("Traceback" in each.said for each in pair)


@pytest.mark.slow
def test_more_processes_than_batches_are_refused_by_one_of_them(runs: Runs):
    quartet = runs.start("four", 4)
    assert [each.wait(timeout=600) for each in quartet] == [2] * 4
    assert ["4 processes train, and an epoch has 3 batches" in each.said for each in quartet] == [True] + [False] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((1, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 3), (3, 1))], ids=str)
def test_a_state_is_resumed_by_another_number_of_processes(before, after, runs: Runs):
    """Processes and accumulated batches, which make six steps of the same images."""
    flags = ("--optimizer_type=AdamW", "--learning_rate=1e-3", "--save_state", "--save_every_n_steps=1", "--ema")
    flags_of = {each: (*flags, f"--gradient_accumulation_steps={each[1]}") for each in (before, after)}
    runs.run("whole", before[0], *flags_of[before])
    runs.run("parts", before[0], *flags_of[before], "--max_train_steps=1")
    runs.run("parts", after[0], *flags_of[after], "--resume=latest")
    whole, parts = (runs.outcome(name)["model m"] for name in ("whole", "parts"))
    for name, weights in whole.items():
        if max(before) == 2:
            assert torch.equal(parts[name], weights), name
        else:
            torch.testing.assert_close(parts[name], weights, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_a_state_of_the_step_that_all_have_done(runs: Runs):
    pair = runs.start("stopped", 2, "--max_train_steps=50")
    pair[0].wait_until_said("1/50", timeout=600)
    for each in pair:
        each.send(signal.SIGTERM)
    assert [each.wait(timeout=600) for each in pair] == [143, 143]
    [state] = runs.output("stopped").glob("m-step*-state")
    assert f'--resume "{state}"' in pair[0].said
