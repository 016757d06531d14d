"""What no one planned for in the middle of a run: the last complete step is saved, one line says what happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel

import sdxl_train
from library.data.dataset import CaptionedImages
from library.training.progress import read_progress
from library.training.run_lock import run_lock
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator

pytestmark = [pytest.mark.slow, pytest.mark.trains]  # whole runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def argv(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path) -> list[str]:
    """A run of many steps, 60 in an epoch, that saves nothing before its end."""
    return [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / "output"),
        *("--output_name=m", "--seed=7", "--max_train_steps=55", "--dataset_repeats=20", *BUCKET_FLAGS),
    ]


def assert_saved_and_said(said: str, problem: str, step: int | None = None) -> Path:
    """Return the state that the one line of an error names; it is of a complete step."""
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert problem in line
    found = re.search(r'All that was learnt in (\d+) steps is saved; continue with --resume "(.+)"', line)
    assert found is not None, line
    state = Path(found[2])
    assert read_progress(state).step == int(found[1])
    assert step is None or int(found[1]) == step
    return state


KINDS = {
    "memory": (MemoryError(), "this machine is out of memory", 1),
    "overflow": (OverflowError("too large"), "(OverflowError: too large)", 1),
    "recursion": (RecursionError("too deep"), "(RecursionError: too deep)", 1),
    "division": (ZeroDivisionError("by zero"), "(ZeroDivisionError: by zero)", 1),
    "a library": (KeyError("of a library"), "KeyError", 1),
    "a GPU error": (RuntimeError("CUDA error: unspecified launch failure"), "the GPU or its driver has failed", 1),
    "a full GPU": (torch.OutOfMemoryError("CUDA out of memory."), "the GPU is out of memory in step 2", 2),
}


# A run for each: one kind stands for all, whose sentences tests/config/test_unforeseen.py has.
@pytest.mark.parametrize(
    "kind", [kind if kind == "memory" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_any_error_in_a_step_saves_the_step_before(kind: str, argv, tmp_path: Path, monkeypatch, capsys):
    error, problem, status = KINDS[kind]
    forward, calls = UNet2DConditionModel.forward, []

    def fail_in_second_step(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return forward(self, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", fail_in_second_step)
    forget_accelerator()
    assert sdxl_train.main([*argv, "--max_data_loader_n_workers=0"]) == status
    state = assert_saved_and_said(capsys.readouterr().err, problem, step=1)
    if kind == "memory":
        forget_accelerator()
        assert (
            sdxl_train.main([*argv, "--max_data_loader_n_workers=0", f"--resume={state}", "--max_train_steps=2"]) == 0
        )


@pytest.mark.slow
def test_an_error_in_the_middle_of_an_update_names_the_newest_state(argv, tmp_path: Path, monkeypatch, capsys):
    step, calls = torch.optim.AdamW.step, []

    def fail_in_third_step(self, *arguments, **named):
        if self.param_groups[0]["name"] == "unet":  # not where the optimizer is tried on a few numbers
            calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail_in_third_step)
    monkeypatch.setattr("library.optim.stepping._CHUNK", 10**9)  # one call in a step
    forget_accelerator()
    flags = ("--max_data_loader_n_workers=0", "--save_every_n_steps=1", "--save_state")
    assert sdxl_train.main([*argv, *flags]) == 1
    said = capsys.readouterr().err
    assert "this machine is out of memory" in said
    assert f'Continue from the newest state with --resume "{tmp_path / "output" / "m-step00000002-state"}"' in said
    assert "is saved; continue" not in said


def test_a_batch_that_never_comes_ends_the_run_after_a_complete_step(argv, monkeypatch, capsys):
    """As from a network disk that is away, or a worker that hangs."""
    monkeypatch.setattr("library.data.prefetch.REPORT_SECONDS", 0.5)
    monkeypatch.setattr("library.data.prefetch.MOST_REPORTS", 8)
    read, came, calls = CaptionedImages.__getitem__, threading.Event(), []

    def never_come(self, micro_batch):
        calls.append(1)
        if len(calls) > 2:
            came.wait()
        return read(self, micro_batch)

    monkeypatch.setattr(CaptionedImages, "__getitem__", never_come)
    forget_accelerator()
    try:
        assert sdxl_train.main([*argv, "--max_data_loader_n_workers=0"]) == 2
    finally:
        came.set()
    said = capsys.readouterr().err
    assert "waiting for the next batch" in said
    assert_saved_and_said(said, "the next batch has not come for 4 s", step=2)


# -- real processes ---------------------------------------------------------------------------------------------------


def workers_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def test_a_killed_worker_ends_the_run_after_a_complete_step(argv, run_server):
    run = run_server("train", [*argv, "--max_data_loader_n_workers=2"])
    run.wait_until_said("1/55")
    workers_of(run.pid)[0].send_signal(signal.SIGKILL)
    assert run.wait() == 1
    assert_saved_and_said(run.said, "a worker process that reads images has ended")


@pytest.mark.slow
def test_workers_that_outlive_a_killed_run_do_not_hold_its_lock(argv, run_server, tmp_path: Path):
    run = run_server("train", [*argv, "--max_data_loader_n_workers=2"])
    run.wait_until_said("1/55")
    workers = workers_of(run.pid)
    for worker in workers:
        worker.suspend()  # they cannot find out that their parent is gone
    try:
        run.send(signal.SIGKILL)
        run.wait()
        assert all(worker.is_running() for worker in workers)
        with run_lock(tmp_path / "output", "m"):
            pass
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.slow
def test_a_killed_process_of_two_ends_the_other_after_a_complete_step(argv, run_server, free_port, tmp_path: Path):
    port = str(free_port())
    flags = [*argv, "--max_data_loader_n_workers=0"]
    main, other = (
        run_server("train", flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, PORT=port) for rank in ("0", "1")
    )
    main.wait_until_said("1/55")
    other.send(signal.SIGKILL)
    assert main.wait() == 1
    assert_saved_and_said(main.said, "another process of this run has ended or cannot be reached")
    assert other.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_of_two_that_does_not_answer_ends_the_other_after_a_complete_step(argv, run_server, free_port):
    port = str(free_port())
    flags = [*argv, "--max_data_loader_n_workers=0", "--ddp_timeout=0.3"]
    main, other = (
        run_server("train", flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, PORT=port) for rank in ("0", "1")
    )
    main.wait_until_said("1/55")
    other.send(signal.SIGSTOP)
    try:
        assert main.wait() == 1
    finally:
        other.kill()
    assert_saved_and_said(main.said, "another process of this run does not answer")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no private /dev/shm can be mounted here")
def test_full_shared_memory_is_named_and_nothing_hangs(argv, prepared_set: PreparedSet, tmp_path: Path):
    alone = prepared_set.without_latents(tmp_path / "set")  # pixels, far larger than latents
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=160k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode != 0:
        pytest.skip("no private /dev/shm can be mounted here")
    flags = [flag for flag in argv if not flag.startswith(("--in_json", "--train_data_dir"))] + [
        f"--in_json={alone.captions_json}",
        f"--train_data_dir={alone.images}",
        "--max_data_loader_n_workers=1",
    ]
    began = time.monotonic()
    ended = subprocess.run(
        [*small, sys.executable, str(ROOT / "sdxl_train.py"), *flags, "--resolution=128,128"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert ended.returncode in (1, 2), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "the shared memory (/dev/shm), through which worker processes hand over batches, is full" in ended.stderr
    assert "--shm-size=8g" in ended.stderr
    assert time.monotonic() - began < 300
