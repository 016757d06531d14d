"""One setting of training, with the outcome of a round that nobody disturbed, and rounds of kills beside it."""

import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.kill_aims import RANGES, Kill, phase_of, start_and_kill
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from tests.forked_runs import Command, ForkedRun, RunServer
from tests.outcome import Outcome, differences, outcome_of

NUM_IMAGES = 5
MOST_ATTEMPTS = 100
MOST_SECONDS = 900.0
"""How long an undisturbed process may take on a busy machine."""
_BUCKETS = ("--min_bucket_reso=64", "--max_bucket_reso=128", "--bucket_reso_steps=64")
_NARROW = ("--mixed_precision=bf16", "--full_bf16")
_ACCUMULATING = ("--train_batch_size=2", "--gradient_accumulation_steps=2")


@dataclass(frozen=True)
class Setting:
    """How a run trains: its flags, its number of processes, and whether the preparation is killed as well."""

    flags: tuple[str, ...]
    num_processes: int = 1
    prepares: bool = False


_AVERAGED = ("--ema", "--ema_snapshot_every_n_steps=2")
PLAIN = Setting(("--cache_latents_to_disk", "--flip_aug", *_ACCUMULATING, *_AVERAGED), prepares=True)
SETTINGS = {
    "plain": PLAIN,
    "clipping with the fused step": Setting(
        (
            *("--optimizer_type=Adafactor", "--optimizer_args", "scale_parameter=False", "relative_step=False"),
            *("warmup_init=False", "--fused_backward_pass", "--max_grad_norm=0.01", *_NARROW),
            *("--ema", "--ema_precision=bf16", "--ema_every=2", "--sample_ema"),
        )
    ),
    "kahan with Lion": Setting(("--optimizer_type=Lion", *_NARROW, "--bf16_rounding=kahan", "--train_batch_size=2")),
    "two processes, bf16, accumulation": Setting(
        ("--mixed_precision=bf16", "--gradient_accumulation_steps=2", *_AVERAGED), num_processes=2
    ),
    "text and latents cached": Setting(
        ("--cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--train_batch_size=2")
    ),
    "8-bit AdamW": Setting(("--optimizer_type=AdamW8bit", "--train_batch_size=2")),
}


class CannotRun(Exception):
    """A run ended by itself, with an error."""


class KillExperiment:
    """A set of images to prepare and train on, in `folder`, and the outcome of both undisturbed."""

    def __init__(self, server: RunServer, folder: Path, *, num_steps: int, setting: Setting = PLAIN):
        self._server = server
        self._folder = folder
        self._num_steps = num_steps
        self._setting = setting
        self._model = folder / "tiny.safetensors"
        write_random_sdxl(self._model, TINY, torch.float16, seed=0)
        _make_images(folder / "set")
        (folder / "prompt.txt").write_text("a cat --e photo --w 64 --h 64 --s 1 --d 3", encoding="utf-8")
        started = time.monotonic()
        self.expected, _ = self._round(folder / "undisturbed", None)
        self.seconds = time.monotonic() - started

    def killed_round(self, name: str, chance: random.Random) -> tuple[list[Kill], list[str]]:
        """Prepare and train with kills in between; return the kills, and what differs from the undisturbed round."""
        found, kills = self._round(self._folder / name, chance)
        shutil.rmtree(self._folder / name)
        return kills, differences(self.expected, found)

    def _round(self, folder: Path, chance: random.Random | None) -> tuple[Outcome, list[Kill]]:
        shutil.copytree(self._folder / "set", folder / "set")
        argv = [folder / "set" / "images", folder / "set" / "meta_cap.json", folder / "meta_lat.json", self._model]
        prepare = [*map(str, argv), "--max_resolution=64,64", *_BUCKETS, "--flip_aug", "--skip_existing"]
        kills = list(self._until_done("prepare", prepare, folder, chance if self._setting.prepares else None))
        prepared = outcome_of(folder, images=folder / "set")
        metadata = json.loads((folder / "meta_lat.json").read_text(encoding="utf-8"))

        for cache in list((folder / "set" / "images").glob("*.npz"))[::2]:
            cache.unlink()  # the trainer makes these again, or encodes them in each step
        kills += self._until_done("train", self._training(folder), folder, chance)
        trained = outcome_of(folder / "output", folder / "logs", folder / "set")
        return {f"prepared {name}": thing for name, thing in prepared.items()} | trained | {"meta": metadata}, kills

    def _training(self, folder: Path) -> list[str]:
        return [
            *(f"--pretrained_model_name_or_path={self._model}", f"--in_json={folder / 'meta_lat.json'}"),
            *(f"--train_data_dir={folder / 'set' / 'images'}", f"--output_dir={folder / 'output'}"),
            *(f"--logging_dir={folder / 'logs'}", "--output_name=m", "--resolution=64,64", *_BUCKETS),
            *(f"--max_train_steps={self._num_steps}", "--save_every_n_steps=1", "--save_last_n_steps=1"),
            *("--save_state", "--save_every_n_epochs=2"),
            *(f"--sample_prompts={self._folder / 'prompt.txt'}", "--sample_every_n_steps=2"),
            *("--seed=7", "--learning_rate=1e-3", "--lr_scheduler=cosine", "--max_data_loader_n_workers=0"),
            *self._setting.flags,
        ]

    def _until_done(
        self, script: str, argv: Sequence[str], folder: Path, chance: random.Random | None
    ) -> Iterator[Kill]:
        for attempt in range(MOST_ATTEMPTS):
            command = [*argv]
            if script == "train":
                command += _continuing(folder)
                command += [f"--max_data_loader_n_workers={chance.choice([0, 2])}"] if chance is not None else []
            output = folder.with_name(f"{folder.name} {script} {attempt}.txt")
            start = partial(self._start_processes, script, command, output)
            aim, runs = ("", start({})) if chance is None else start_and_kill(start, folder, RANGES[script], chance)
            statuses = [run.wait(MOST_SECONDS) for run in runs]
            if statuses[0] == 0:
                return
            if -signal.SIGKILL not in statuses:
                raise CannotRun(f"status {statuses}: {runs[0].said}")
            yield Kill(script, aim, phase_of(folder, runs[0].said))
        raise RuntimeError(f"{folder} is not done after {MOST_ATTEMPTS} attempts")

    def _start_processes(
        self, script: str, argv: Sequence[str], output: Path, aimed: Mapping[str, str]
    ) -> Sequence[ForkedRun]:
        if script == "prepare" or self._setting.num_processes == 1:
            return [self._server.start(Command(script, argv, output, aimed))]
        together = {"WORLD_SIZE": str(self._setting.num_processes), "MASTER_ADDR": "127.0.0.1"}
        together |= {"MASTER_PORT": str(_free_port())}
        runs = []
        for rank in range(self._setting.num_processes):
            environment = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(aimed if rank == 0 else {})
            own_output = output.with_name(f"{output.stem} {rank}.txt")
            runs.append(self._server.start(Command(script, argv, own_output, environment)))
        return runs


def _continuing(folder: Path) -> list[str]:
    """Return the flag that continues from a state; without one, remove what a run left that starts again."""
    if any((folder / "output").glob("*-state/progress.json")):
        return ["--resume=latest"]
    shutil.rmtree(folder / "logs", ignore_errors=True)  # another run, to which its images do not belong
    shutil.rmtree(folder / "output" / "sample", ignore_errors=True)
    return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _make_images(folder: Path) -> None:
    """Write images of noise with their captions, and the metadata of the merge scripts."""
    images = folder / "images"
    images.mkdir(parents=True)
    random_pixels = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        width, height = [(64, 64), (70, 60), (130, 40)][number % 3]
        pixels = random_pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
        (images / f"{number:02d}.caption").write_text(f"content {number}", encoding="utf-8")
        (images / f"{number:02d}.txt").write_text(f"style {number}", encoding="utf-8")
    for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
        if script.main([str(images), str(folder / "meta_cap.json")]) != 0:
            raise RuntimeError("the captions could not be merged")
