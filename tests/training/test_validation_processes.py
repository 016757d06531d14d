"""Validation shared by two processes finds what one finds, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags
from tests.correctness.test_two_processes import ROOT, free_port

pytestmark = [pytest.mark.slow, pytest.mark.trains]


def test_two_processes_measure_what_one_measures(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path):
    found = {}
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
        flags = [
            *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, folder / "output"),
            *("--resolution=128,128", "--max_data_loader_n_workers=0", "--max_train_steps=0", "--validate_at_first"),
            *("--validation_split=1.0", "--validation_timesteps", "300", "800", f"--logging_dir={folder / 'logs'}"),
            *("--validation_ablation", "--train_text_encoder", *BUCKET_FLAGS),  # three batches: one is left over
        ]
        subprocess.run(
            [*launch, f"--master_port={free_port()}", str(ROOT / "sdxl_train.py"), *flags],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
        [file] = (folder / "logs").glob("*/validation.jsonl")
        found[num_processes] = file.read_text(encoding="utf-8")
    assert found[1] == found[2]
