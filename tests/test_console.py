"""Nothing is printed that a user need not read: each line of real runs is one of those listed here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quickstart import QUIET_LAUNCH
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags

pytestmark = pytest.mark.slow  # whole runs

REPOSITORY = Path(__file__).parents[1]
# What the machine of the test may differ in and libraries warn of: a CUDA toolkit without a GPU.
NOISY = {"CUDA_HOME": "/usr/local", "OMP_NUM_THREADS": "1"}
NUMBER = r"[0-9.,]+"
NAME = r"'[^']+'"
SUMMARY = [
    rf"\d+ steps in \d+:\d\d:\d\d: \d+ images seen, {NUMBER} images a second",
    rf"last loss {NUMBER}, average {NUMBER}",
    rf"wrote {NAME}(, {NAME})*( and {NAME})?",
    r"next: open the model in ComfyUI or a WebUI \(docs/captions-and-prompts.md\)",
    r'its samples on a page: python finetune/contact_sheet.py ".*"',
    r"to train longer: the same command with --resume latest and a larger --max_train_steps",
]
SAVING = [*SUMMARY, rf"saving {NAME}", rf"saved {NAME}( and {NAME})?"]
TRAINING = [
    r"training in one process on (cpu|cuda)",
    rf"loading {NAME}",
    rf"{NUMBER} images in {NUMBER} batches, {NUMBER} steps per epoch, {NUMBER} steps in {NUMBER} epochs, seed {NUMBER}",
    r"captions: L from \S.* \(\d+ different\), G from \S.* \(\d+ different\)",
    r"trained: U-Net; frozen: L, G \(a frozen L learns no new style words: docs/separate-captions.md\)",
    r"text encoder [LG]: \d+ different captions, .*",
    r"masks: \d+ from (files|alpha channels)( and \d+ .*)?, of \d+ images; the others are trained whole",
    r"validation: \d+ images are held out \(.*\), \d+ timesteps, \d+ conditions",
    rf"step \d+: validation loss( of the ema weights)? {NUMBER}, \d+ images, {NUMBER} s",
    *SAVING,
]
SAMPLES = [r"step \d+: drawing sample \d+ of \d+", r"step \d+: drawing the grid of \d+ images"]
BAR = re.compile(r"(steps|encoding|captions|validation): .*\d+/\d+ \[.*\]|\s*")


def lines_of(command: list[str], cwd: Path) -> list[str]:
    """What the command prints to stdout and stderr, without progress bars."""
    environment = {**os.environ, **NOISY, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    assert ended.returncode == 0, ended.stdout
    return [line.strip() for line in re.split(r"[\r\n]", ended.stdout) if not BAR.fullmatch(line)]


def unexpected(lines: list[str], allowed: list[str]) -> list[str]:
    return [line for line in lines if not any(re.fullmatch(each, line) for each in allowed)]


@pytest.fixture
def training_flags(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path) -> list[str]:
    return [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / "output"),
        *("--output_name=m", "--resolution=128,128", "--max_data_loader_n_workers=0", "--max_train_steps=1"),
        *BUCKET_FLAGS,
    ]


def test_a_run_prints_what_it_does_and_nothing_else(training_flags: list[str], tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat --e x --w 64 --h 64 --s 1\na dog --e y --w 64 --h 64 --s 1\n")
    more = [
        *("--sample_prompts=prompts.txt", "--sample_every_n_steps=1", "--sample_grid", "--save_state"),
        *("--optimizer_type=AdamW8bit", "--logging_dir=logs", "--cache_text_encoder_outputs"),
    ]
    lines = lines_of([sys.executable, str(REPOSITORY / "sdxl_train.py"), *training_flags, *more], tmp_path)
    assert unexpected(lines, [*TRAINING, *SAMPLES]) == []
    expected = [
        "loading",
        *("step 0: drawing sample 1 of 2", "step 0: drawing sample 2 of 2", "step 0: drawing the grid of 4 images"),
        *("saving 'm.safetensors'", "saving 'm-state'", "saved"),
        *("step 1: drawing sample 1 of 2", "step 1: drawing sample 2 of 2", "step 1: drawing the grid of 4 images"),
    ]
    told = iter(lines)
    assert all(any(line.startswith(start) for line in told) for start in expected), lines


@pytest.mark.slow
def test_the_launcher_of_the_demo_adds_nothing(training_flags: list[str], tmp_path: Path):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *QUIET_LAUNCH]
    flags = [*training_flags, "--save_state_on_train_end"]
    lines = lines_of(
        [*launcher, "--num_cpu_threads_per_process=1", str(REPOSITORY / "sdxl_train.py"), *flags], tmp_path
    )
    assert unexpected(lines, TRAINING) == []
    output = tmp_path / "output"
    assert f"saved '{output / 'm.safetensors'}' and '{output / 'm-state'}'" in lines
    assert lines[-1].startswith("to train longer: ")


@pytest.mark.slow
def test_preparing_prints_what_was_made_and_nothing_else(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path):
    made = prepared_set.without_latents(tmp_path / "set")
    script = REPOSITORY / "finetune" / "prepare_buckets_latents.py"
    paths = [made.images, made.captions_json, made.folder / "meta_lat.json", tiny_sdxl]
    lines = lines_of(
        [sys.executable, str(script), *map(str, paths), "--max_resolution=128,128", *BUCKET_FLAGS], tmp_path
    )
    allowed = [rf"wrote \d+ entries, .* to {NAME}", r"buckets:", r"bucket +images", r"\d+x\d+ +\d+", r"\d+ images .*"]
    assert unexpected(lines, allowed) == []


IMPORT_WHAT_WARNS = """
import logging
from library.config.messages import start_logging
start_logging()
import torch.utils.cpp_extension
# As a CPU with bfloat16 instructions has it:
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward: %s", "no kernels")
"""


def test_libraries_do_not_warn_of_what_is_not_used(tmp_path: Path):
    assert lines_of([sys.executable, "-c", IMPORT_WHAT_WARNS], tmp_path) == []
