"""sdxl_train.py in two processes as on two GPUs: one model, trained on the pictures of both."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.data.epoch_order import BatchShape
from tests.conftest import RATE, PreparedSet, base_flags
from tests.correctness.plain_training import PlainNoise, PlainTraining, batches_of_steps

pytestmark = [pytest.mark.trains, pytest.mark.slow]  # three processes import torch, and a fourth trains beside them

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def three_pictures(two_buckets: PreparedSet, tmp_path: Path) -> PreparedSet:
    """An odd number: in the last step one process has nothing to do."""
    made = PreparedSet(tmp_path / "set")
    shutil.copytree(two_buckets.folder, made.folder)
    entries = json.loads(made.latents_json.read_text(encoding="utf-8"))
    chosen = ("astronaut whole", "astronaut strip", "chelsea whole")
    made.latents_json.write_text(json.dumps({key: entries[key] for key in chosen}), encoding="utf-8")
    return made


def test_two_processes_train_on_the_mean_of_their_gradients(
    tiny_sdxl: Path, three_pictures: PreparedSet, diffusers_model, tmp_path: Path
):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a cat --e photo --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    # What `accelerate launch --multi_gpu` does on GPUs; on CPUs it would ask for MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finished = subprocess.run(
        [
            *launch,
            str(ROOT / "sdxl_train.py"),
            *base_flags(tiny_sdxl, three_pictures.latents_json, three_pictures.images, tmp_path / "output"),
            f"--sample_prompts={prompts}",
            *("--output_name=m", "--max_data_loader_n_workers=0", "--max_train_epochs=1"),
            *("--optimizer_type=torch.optim.SGD", f"--learning_rate={RATE}", "--max_grad_norm=0"),
            *("--gradient_checkpointing", "--sample_every_n_steps=1"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        encoding="utf-8",
    )
    assert finished.returncode == 0, finished.stderr
    # Without --seed each process would draw its own, and with it another order: the main one's holds for both.
    [seed] = (int(digits) for digits in re.findall(r"3 images in 3 batches, 2 steps .*, seed (\d+)", finished.stdout))
    assert len(list((tmp_path / "output" / "sample").iterdir())) == 3  # drawn once, not by each process

    plain = PlainTraining(diffusers_model, three_pictures, PlainNoise())
    parameters = list(plain.trained["unet"].parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    [first], [second], [third] = batches_of_steps(three_pictures, BatchShape(), seed)
    for shares in ([first, second], [third]):
        optimizer.zero_grad()
        plain.backward(shares, seed)
        optimizer.step()

    trained, before = load_file(tmp_path / "output" / "m.safetensors"), load_file(tiny_sdxl)
    for name, weight in plain.unet_weights().items():
        # Gradients are exchanged and summed in another order: 1e-6 of the largest weights of a tensor, twice.
        scale = (weight - before[name]).abs().max().item()
        torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-3 * scale + 1e-7)
