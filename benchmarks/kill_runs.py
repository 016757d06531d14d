"""Kill runs inside writes and at random moments, restart them until they are done, and compare the outcome.

    python benchmarks/kill_runs.py [--num_kills 100] [--seed 0] [--settings plain "kahan with Lion"]

Each round trains the tiny SDXL in one of the settings, saving model and state after every step; the plain one prepares
latents first. Every process is killed by SIGKILL and started again with --skip_existing or --resume latest. Half of the
kills are aimed at a write: the folder is watched, and a temporary file that appears is the signal. The others come just
before a random file operation, or after a random time. What is left at the end is compared, bit for bit, with a run
that nobody disturbed. The result goes to benchmarks/results/kill_runs_settings.{json,txt}. Needs POSIX.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from PIL import Image

from benchmarks.result_files import RESULTS, machine_line, write_result
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX
from tests.forked_runs import FOLDER, KILL_AT, Command, ForkedRun, RunServer
from tests.outcome import Outcome, differences, outcome_of

NUM_IMAGES = 5
MOST_ATTEMPTS = 100
MOST_SECONDS = 900.0
"""How long an undisturbed process may take on a busy machine."""
LAST_SECONDS = 20.0
"""How long the other process of a run may take to notice that one was killed; then it is killed, as a launcher does."""
_BUCKETS = ("--min_bucket_reso=64", "--max_bucket_reso=128", "--bucket_reso_steps=64")
_PHASE_OF_SUFFIX = {".npz": "latents", ".safetensors": "model", ".png": "image", ".json": "metadata"}
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


@dataclass(frozen=True)
class Kill:
    """One kill: how it was aimed, and which phase it hit, as far as the files it left tell."""

    script: str
    aim: str
    phase: str


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
            is_resumable = script == "train" and any((folder / "output").glob("*-state/progress.json"))
            command = [*argv, "--resume=latest"] if is_resumable else list(argv)
            if script == "train" and not is_resumable:  # another run, to which the images of the first do not belong
                shutil.rmtree(folder / "logs", ignore_errors=True)
                shutil.rmtree(folder / "output" / "sample", ignore_errors=True)
            if chance is not None and script == "train":
                command.append(f"--max_data_loader_n_workers={chance.choice([0, 2])}")
            said = folder.with_name(f"{folder.name} {script} {attempt}.txt")
            aim, runs = self._start(script, command, folder, said, chance)
            statuses = [run.wait(MOST_SECONDS) for run in runs]
            if statuses[0] == 0:
                return
            if -signal.SIGKILL not in statuses:
                raise CannotRun(f"status {statuses}: {runs[0].said}")
            yield Kill(script, aim, _phase(folder, runs[0].said))
        raise RuntimeError(f"{folder} is not done after {MOST_ATTEMPTS} attempts")

    def _start(
        self, script: str, argv: Sequence[str], folder: Path, said: Path, chance: random.Random | None
    ) -> tuple[str, list[ForkedRun]]:
        """Start the processes of a run; if there is a `chance`, aim a kill at one of them."""
        if chance is None:
            return "", self._start_processes(script, argv, said)
        kind = chance.choice(["write", "write", "operation", "time"])
        if kind == "operation":
            number = chance.randrange(1, 16 if script == "prepare" else 160)
            aimed = {KILL_AT: str(number), FOLDER: str(folder)}
            runs = self._start_processes(script, argv, said, aimed)
            aim = f"before file operation {number}"
            wait_for_end(runs)
        else:
            runs = self._start_processes(script, argv, said)
            victim = chance.choice(runs)
            if kind == "write":
                number, delay = chance.randrange(1, 4 if script == "prepare" else 12), chance.uniform(0, 0.03)
                aim = f"{1000 * delay:.0f} ms after temporary file {number} appeared"
                wait_for_temporary_file(folder, number, victim)
                time.sleep(delay)
            else:
                seconds = chance.uniform(0.2, 3 if script == "prepare" else 6)
                aim = f"after {seconds:.2f} s"
                victim.wait_or_go_on(seconds)
            if not victim.is_over():
                victim.send(signal.SIGKILL)
            aim += "" if victim is runs[0] else ", the second process"
        for run in runs:
            if not run.wait_or_go_on(LAST_SECONDS):
                run.send(signal.SIGKILL)
        return aim, runs

    def _start_processes(
        self, script: str, argv: Sequence[str], said: Path, aimed: Mapping[str, str] | None = None
    ) -> list[ForkedRun]:
        if script == "prepare" or self._setting.num_processes == 1:
            return [self._server.start(Command(script, argv, said, aimed or {}))]
        together = {"WORLD_SIZE": str(self._setting.num_processes), "MASTER_ADDR": "127.0.0.1"}
        together |= {"MASTER_PORT": str(_free_port())}
        runs = []
        for rank in range(self._setting.num_processes):
            environment = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict((rank == 0 and aimed) or {})
            runs.append(
                self._server.start(Command(script, argv, said.with_name(f"{said.stem} {rank}.txt"), environment))
            )
        return runs


def wait_for_end(runs: Sequence[ForkedRun]) -> None:
    """Wait until one of the processes has ended."""
    while not any(run.is_over() for run in runs):
        time.sleep(_POLL_SECONDS)


def wait_for_temporary_file(folder: Path, number: int, run: ForkedRun) -> None:
    """Wait until `number` temporary files and folders have appeared in `folder`, or until the run is over."""
    seen: set[str] = set()
    while len(seen) < number and not run.is_over():
        for place, folders, files in os.walk(folder):
            seen |= {f"{place}/{name}" for name in (*folders, *files) if name.endswith(PARTIAL_SUFFIX)}
        time.sleep(_POLL_SECONDS)


_POLL_SECONDS = 0.0005


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


def _phase(folder: Path, said: str) -> str:
    """Return what a killed process was doing, as far as the files it left tell."""
    for path in folder.rglob("*"):
        if path.suffix == REPLACED_SUFFIX:
            return "renaming a folder"
        if path.suffix == PARTIAL_SUFFIX and path.is_dir():
            return f"state, {len(list(path.iterdir()))} files begun"
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        return _PHASE_OF_SUFFIX.get(Path(path.stem).with_suffix("").suffix, path.name)
    return "a step, or between two files" if "steps an epoch" in said else "start"


class CannotRun(Exception):
    """A run ended by itself, with an error."""


def run_kills(
    num_kills: int, minutes: float, seed: int, num_steps: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Run rounds of kills, setting by setting, until there are `num_kills` or time is up; yield the figures so far."""
    from benchmarks.ceilings import machine

    chance = random.Random(seed)
    rounds: list[dict[str, Any]] = []
    things_compared: dict[str, int] = {}
    unable: dict[str, str] = {}
    experiments: dict[str, KillExperiment] = {}
    started = time.monotonic()
    with RunServer() as server, tempfile.TemporaryDirectory() as folder:
        for name in itertools.cycle(names):
            passed = (time.monotonic() - started) / 60
            if sum(len(each["kills"]) for each in rounds) >= num_kills or passed > minutes or len(unable) == len(names):
                return
            if name in unable:
                continue
            if name not in experiments:
                (Path(folder) / name).mkdir()
                try:
                    experiments[name] = KillExperiment(
                        server, Path(folder) / name, num_steps=num_steps, setting=SETTINGS[name]
                    )
                except CannotRun as error:
                    unable[name] = str(error)
                    print(f"{name} does not run here: {error}", flush=True)
                    continue
                things_compared[name] = len(experiments[name].expected)
                print(f"{name}: undisturbed in {experiments[name].seconds:.0f} s", flush=True)
            killed, different = experiments[name].killed_round(f"round {len(rounds) + 1}", chance)
            rounds.append({"setting": name, "kills": [vars(kill) for kill in killed], "differences": different})
            print(f"round {len(rounds)}, {name}: {len(killed)} kills, differences: {different or 'none'}", flush=True)
            kills = [kill for each in rounds for kill in each["kills"]]
            yield {
                "machine": machine(),
                "seed": seed,
                "num_steps": num_steps,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "num_kills": len(kills),
                "kills_by_phase": dict(Counter(f"{kill['script']}: {kill['phase']}" for kill in kills).most_common()),
                "things_compared": things_compared,
                "settings_that_do_not_run": unable,
                "num_rounds_that_differ": sum(bool(each["differences"]) for each in rounds),
                "rounds": rounds,
            }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    rounds = result["rounds"]
    lines = [
        machine_line(result["machine"]),
        "",
        f"{result['num_kills']} kills in {len(rounds)} rounds of training ({result['num_steps']} steps), "
        f"seed {result['seed']}, {result['minutes']} minutes",
        f"{result['num_rounds_that_differ']} rounds differ from the undisturbed one of their setting in any of "
        f"{min(result['things_compared'].values())} to {max(result['things_compared'].values())} things: models, "
        "states, images, curves, latents, metadata",
        "",
    ]
    for name in result["things_compared"]:
        own = [each for each in rounds if each["setting"] == name]
        num_kills = sum(len(each["kills"]) for each in own)
        lines.append(f"{num_kills:5} kills in {len(own):2} rounds   {name}")
    lines += [f"      does not run here: {name}" for name in result["settings_that_do_not_run"]]
    lines += ["", *(f"{count:5} kills hit   {phase}" for phase, count in result["kills_by_phase"].items()), ""]
    lines += [
        f"round {number}: {each['setting']}, {len(each['kills'])} kills, "
        f"{', '.join(each['differences']) or 'bit for bit the same'}"
        for number, each in enumerate(rounds, start=1)
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Kill, compare and write the figures; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round after this time")
    parser.add_argument("--num_steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="kill_runs_settings", help="name of the files of figures")
    arguments = parser.parse_args()
    num_differ = 0
    for result in run_kills(
        arguments.num_kills, arguments.minutes, arguments.seed, arguments.num_steps, arguments.settings
    ):
        write_result(arguments.results / arguments.name, result, table(result))  # what is known by now
        num_differ = result["num_rounds_that_differ"]
    return 1 if num_differ else 0


if __name__ == "__main__":
    sys.exit(main())
