"""Compare fine-tunes of the demo with separate captions and with one joint caption, for several seeds.

python demo/compare_captions.py "my set/comparison"            three seeds, six runs of four minutes each
python demo/compare_captions.py "my set/comparison" --seeds 0  one of each
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/ and quickstart.py

import quickstart
from demo.figures import SCENES_PER_PAIR, Readings, mean_figures, measure
from demo.pictures import fine_tuning_scenes, write_training_set
from library.config.atomic_files import write_text
from library.config.errors import UserError, exits_on_user_error
from quickstart import DemoSize

BASE = quickstart.ROOT / quickstart.DEMO_MODEL
CASES = {  # name: joint captions in training (None: no training), joint prompts in the measured images
    "before, separate prompts": (None, False),
    "before, joint prompt": (None, True),
    "separate captions, separate prompts": (False, False),
    "joint caption, joint prompt": (True, True),
    "joint caption, separate prompts": (True, False),
}


def fine_tune(folder: Path, size: DemoSize, more_flags: Sequence[str], seed: int, *, joint: bool) -> Path:
    """Run the workflow of the demo on the training set of `seed`, and return the path of the model.

    An earlier `folder` is kept under another name. The output of the scripts is shown.
    """
    try:
        quickstart.set_aside(folder)
    except quickstart.QuickstartError as error:
        raise UserError(str(error)) from error
    write_training_set(folder / "images", fine_tuning_scenes(size.num_pictures, seed), joint=joint)
    flags = [*more_flags, f"--seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for command in quickstart.workflow_commands(folder.absolute(), size.num_steps, flags):
        script = next(index for index, word in enumerate(command) if word.endswith(".py"))
        ran = subprocess.run([sys.executable, *command[script:]], cwd=quickstart.ROOT, env=environment)
        if ran.returncode:
            raise UserError(f"'{command[script]}' for '{folder}' ended with exit status {ran.returncode}, see above.")
    return folder / "output" / "finetuned_model.safetensors"


def fine_tune_all(
    folder: Path, size: DemoSize, more_flags: Sequence[str], seeds: Sequence[int], at_once: int
) -> dict[tuple[int, bool], Path]:
    """Return the models by seed and by whether their captions were joint. Raise `UserError` if a script fails."""

    def one(seed: int, joint: bool) -> Path:
        own_folder = folder / f"{'joint' if joint else 'separate'}-{seed}"
        return fine_tune(own_folder, size, more_flags, seed, joint=joint)

    each = [(seed, joint) for seed in seeds for joint in (False, True)]
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(each, pool.map(one, *zip(*each, strict=True)), strict=True))


def readings_of_seed(models: Mapping[tuple[int, bool], Path], seed: int, scenes_per_pair: int) -> dict[str, Readings]:
    """Return what the classifier reads in the images of each case, with the prompts of `seed` and the same noise."""
    readings = {}
    for name, (trained, asked) in tqdm(CASES.items(), desc=f"measuring seed {seed}"):
        model = BASE if trained is None else models[seed, trained]
        readings[name] = measure(model, joint=asked, scenes_per_pair=scenes_per_pair, seed=seed)
    return readings


def table(by_seed: Mapping[int, Mapping[str, Readings]]) -> str:
    """Return the means over the seeds, and the figures of each seed, as a Markdown table."""
    lines = ["| | style right | content right | style words change content | content words change style |"]
    lines.append("|---|---|---|---|---|")
    for name in CASES:
        each = [readings[name].figures() for readings in by_seed.values()]
        mean = asdict(mean_figures(each))
        cells = [f"**{mean[field]:.0%}** ({', '.join(f'{asdict(one)[field]:.0%}' for one in each)})" for field in mean]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def details_table(by_seed: Mapping[int, Mapping[str, Readings]]) -> str:
    """Return the parts of the figures, averaged over the seeds, as a table with a column for each case."""
    details = {name: [readings[name].details() for readings in by_seed.values()] for name in CASES}
    lines = [f"| | {' | '.join(CASES)} |", f"|---|{'---|' * len(CASES)}"]
    for part in next(iter(details.values()))[0]:
        means = [sum(one[part] for one in each) / len(each) for each in details.values()]
        lines.append(f"| {' | '.join([part, *(f'{mean:.0%}' for mean in means)])} |")
    return "\n".join(lines)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, default=DemoSize.num_steps)
    parser.add_argument("--num_pictures", type=int, default=DemoSize.num_pictures, help="images of each training set")
    parser.add_argument("--scenes_per_pair", type=int, default=SCENES_PER_PAIR, help="prompts of each held-out pair")
    parser.add_argument("--at_once", type=int, default=1, help="fine-tunes to run in parallel")
    parser.add_argument(
        "--training_flags",
        type=shlex.split,
        default=[],
        help='additional flags of sdxl_train.py: --training_flags="--learning_rate=1e-4"',
    )
    arguments = parser.parse_args(argv)
    for name in ("num_steps", "num_pictures", "scenes_per_pair", "at_once"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be 1 or more")
    torch.set_num_threads(1)  # as in the fine-tunes: more threads do not speed up the tiny model
    size = DemoSize(arguments.num_steps, arguments.num_pictures)
    models = fine_tune_all(arguments.folder, size, arguments.training_flags, arguments.seeds, arguments.at_once)
    by_seed = {seed: readings_of_seed(models, seed, arguments.scenes_per_pair) for seed in arguments.seeds}
    numbers = {
        seed: {name: asdict(each.figures()) | each.details() for name, each in readings.items()}
        for seed, readings in by_seed.items()
    }
    write_text(arguments.folder / "figures.json", json.dumps(numbers, indent=2) + "\n")
    tables = f"{table(by_seed)}\n\n{details_table(by_seed)}\n"
    write_text(arguments.folder / "figures.md", tables)
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
