"""Kill runs at random moments, restart them until they are done, and compare the outcome with undisturbed runs.

    python benchmarks/kill_runs.py [--num_kills 120] [--seed 0]

Each round prepares latents and then trains the tiny SDXL, saving model and state after every step. Every process is
killed by SIGKILL, after a random time or just before a random file operation, and then started again with
--skip_existing or --resume latest. The result goes to benchmarks/results/kill_runs.{json,txt}. Needs POSIX.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
_BUCKETS = ("--min_bucket_reso=64", "--max_bucket_reso=128", "--bucket_reso_steps=64")
_PHASE_OF_SUFFIX = {".npz": "latents", ".safetensors": "model", ".png": "image", ".json": "metadata"}


@dataclass(frozen=True)
class Kill:
    """One kill: how it was aimed, and which phase it hit, as far as the files it left tell."""

    script: str
    aim: str
    phase: str


class KillExperiment:
    """A set of images to prepare and train on, in `folder`, and the outcome of both undisturbed."""

    def __init__(self, server: RunServer, folder: Path, *, num_steps: int):
        self._server = server
        self._folder = folder
        self._num_steps = num_steps
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
        kills = list(self._until_done("prepare", prepare, folder, chance))
        prepared = outcome_of(folder, images=folder / "set")
        metadata = json.loads((folder / "meta_lat.json").read_text(encoding="utf-8"))

        for cache in list((folder / "set" / "images").glob("*.npz"))[::2]:
            cache.unlink()  # the trainer makes these again
        kills += self._until_done("train", self._training(folder), folder, chance)
        trained = outcome_of(folder / "output", folder / "logs", folder / "set")
        return {f"prepared {name}": thing for name, thing in prepared.items()} | trained | {"meta": metadata}, kills

    def _training(self, folder: Path) -> list[str]:
        return [
            *(f"--pretrained_model_name_or_path={self._model}", f"--in_json={folder / 'meta_lat.json'}"),
            *(f"--train_data_dir={folder / 'set' / 'images'}", f"--output_dir={folder / 'output'}"),
            *(f"--logging_dir={folder / 'logs'}", "--output_name=m", "--resolution=64,64", *_BUCKETS),
            *("--cache_latents_to_disk", "--flip_aug", "--train_batch_size=2", "--gradient_accumulation_steps=2"),
            *(
                f"--max_train_steps={self._num_steps}",
                "--save_every_n_steps=1",
                "--save_last_n_steps=1",
                "--save_state",
            ),
            *("--save_every_n_epochs=2", f"--sample_prompts={self._folder / 'prompt.txt'}", "--sample_every_n_steps=2"),
            *("--seed=7", "--learning_rate=1e-3", "--lr_scheduler=cosine", "--max_data_loader_n_workers=0"),
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
            aim, run = self._start(script, command, folder, said, chance)
            if (status := run.wait()) == 0:
                return
            if status != -signal.SIGKILL:
                raise RuntimeError(f"attempt {attempt} of {folder} ended with {status}: {run.said}")
            yield Kill(script, aim, _phase(folder, run.said))
        raise RuntimeError(f"{folder} is not done after {MOST_ATTEMPTS} attempts")

    def _start(
        self, script: str, argv: Sequence[str], folder: Path, said: Path, chance: random.Random | None
    ) -> tuple[str, ForkedRun]:
        """Start a run; if there is a `chance`, aim a kill at it."""
        if chance is None:
            return "", self._server.start(Command(script, argv, said))
        if chance.random() < 0.5:
            number = chance.randrange(1, 16 if script == "prepare" else 160)
            aimed = {KILL_AT: str(number), FOLDER: str(folder)}
            return f"before file operation {number}", self._server.start(Command(script, argv, said, aimed))
        seconds = chance.uniform(0.2, 3 if script == "prepare" else 6)
        run = self._server.start(Command(script, argv, said))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not run.is_over():
            time.sleep(0.002)
        if not run.is_over():
            run.send(signal.SIGKILL)
        return f"after {seconds:.2f} s", run


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
            return f"state, {len(list(path.iterdir()))} of 3 files begun"
    for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
        return _PHASE_OF_SUFFIX.get(Path(path.stem).with_suffix("").suffix, path.name)
    return "a step, or between two files" if "steps an epoch" in said else "start"


def run_kills(num_kills: int, seed: int, num_steps: int) -> dict[str, Any]:
    """Run rounds of kills until there are `num_kills`; return all figures."""
    from benchmarks.ceilings import machine

    chance = random.Random(seed)
    rounds: list[dict[str, Any]] = []
    kills: list[Kill] = []
    with RunServer() as server, tempfile.TemporaryDirectory() as folder:
        experiment = KillExperiment(server, Path(folder), num_steps=num_steps)
        while len(kills) < num_kills:
            killed, different = experiment.killed_round(f"round {len(rounds) + 1}", chance)
            kills += killed
            rounds.append({"kills": [vars(kill) for kill in killed], "differences": different})
            print(f"round {len(rounds)}: {len(kills)} kills so far, differences: {different or 'none'}", flush=True)
    return {
        "machine": machine(),
        "seed": seed,
        "num_steps": num_steps,
        "num_kills": len(kills),
        "kills_by_phase": dict(Counter(f"{kill.script}: {kill.phase}" for kill in kills).most_common()),
        "things_compared": len(experiment.expected),
        "undisturbed_seconds": round(experiment.seconds, 1),
        "num_rounds_that_differ": sum(bool(each["differences"]) for each in rounds),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        machine_line(result["machine"]),
        "",
        f"{result['num_kills']} kills in {len(result['rounds'])} rounds of preparing and training "
        f"({result['num_steps']} steps), seed {result['seed']}",
        f"{result['num_rounds_that_differ']} rounds differ from the undisturbed one "
        f"in any of {result['things_compared']} things: models, states, images, curves, latents, metadata",
        "",
        *(f"{count:5} kills hit   {phase}" for phase, count in result["kills_by_phase"].items()),
        "",
        *(
            f"round {number}: {len(each['kills']):2} kills, {', '.join(each['differences']) or 'bit for bit the same'}"
            for number, each in enumerate(result["rounds"], start=1)
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Kill, compare and write the figures; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=120)
    parser.add_argument("--num_steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = run_kills(arguments.num_kills, arguments.seed, arguments.num_steps)
    write_result(arguments.results / "kill_runs", result, table(result))
    print(table(result))
    return 1 if result["num_rounds_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
