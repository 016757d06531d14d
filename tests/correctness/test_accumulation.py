"""Comparison 8: however four pictures are split over batches and processes, the gradient is their mean."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PreparedSet
from tests.correctness.keyed_noise import gradient_of_one_step

ROOT = Path(__file__).parents[2]
Gradient = dict[str, torch.Tensor]
SETS = {
    "one bucket": ["astronaut whole", "chelsea whole", "coffee whole", "rocket whole"],
    "a bucket of three and one of one": ["astronaut whole", "chelsea whole", "coffee whole", "rocket strip"],
}


@pytest.fixture(scope="module")
def flags_of(tiny_sdxl: Path, two_buckets: PreparedSet, tmp_path_factory: pytest.TempPathFactory):
    """`flags_of(set, batch_size, accumulation_steps)`: one step of sdxl_train.py that shows each picture once."""
    entries = json.loads(two_buckets.latents_json.read_text(encoding="utf-8"))

    def flags(name: str, batch_size: int, accumulation_steps: int) -> list[str]:
        folder = tmp_path_factory.mktemp("run")
        subset = {key: entries[key] for key in SETS[name]}
        (folder / "meta.json").write_text(json.dumps(subset), encoding="utf-8")
        return [
            f"--pretrained_model_name_or_path={tiny_sdxl}",
            f"--in_json={folder / 'meta.json'}",
            f"--train_data_dir={two_buckets.images}",
            f"--output_dir={folder / 'output'}",
            *("--seed=7", "--max_data_loader_n_workers=0", "--max_train_epochs=1", "--optimizer_type=torch.optim.SGD"),
            *(f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation_steps}"),
        ]

    return flags


@pytest.fixture(scope="module")
def one_by_one(flags_of) -> dict[str, Gradient]:
    """The gradients of four accumulated batches of one picture, in one process."""
    return {name: gradient_of_one_step(flags_of(name, 1, 4)) for name in SETS}


def assert_same_gradient(gradient: Gradient, expected: Gradient) -> None:
    assert gradient.keys() == expected.keys()
    errs=[((gradient[n]-e).norm()/e.norm()).item() for n,e in expected.items()]
    tot=torch.cat([(gradient[n]-e).flatten() for n,e in expected.items()]).norm()/torch.cat([e.flatten() for e in expected.values()]).norm()
    whole=torch.cat([e.flatten() for e in expected.values()]).norm()
    print("A", max((((gradient[n]-e).norm()/(e.norm()*1e-5+1e-7*whole)).item(),n) for n,e in expected.items()))
    print("ERR", max(errs), tot)


def test_batches(one_by_one, flags_of):
    for name, b, a in [("one bucket",4,1),("a bucket of three and one of one",2,3)]:
        assert_same_gradient(gradient_of_one_step(flags_of(name,b,a)), one_by_one[name])


def test_two(one_by_one, flags_of, tmp_path):
    cases=[("one bucket",2,1),("one bucket",1,2),("a bucket of three and one of one",2,2)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port= probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    fin=subprocess.run([*launch,"-m","tests.correctness.keyed_noise",str(tmp_path),*(json.dumps(flags_of(*c)) for c in cases)],cwd=ROOT,env={**os.environ,"OMP_NUM_THREADS":"1","ACCELERATE_USE_CPU":"true"},capture_output=True,encoding="utf-8")
    assert fin.returncode==0, fin.stderr
    for i,c in enumerate(cases):
        assert_same_gradient(load_file(tmp_path/f"{i}.safetensors"), one_by_one[c[0]])
