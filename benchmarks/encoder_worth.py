"""Measure what each encoder is worth on images that were not trained: the demo, with separate and with joint captions.

    python benchmarks/encoder_worth.py "my set/worth"              three seeds, six fine-tunes of five minutes each
    python benchmarks/encoder_worth.py "my set/worth" --seeds 0    one of each

Each run is the workflow of the demo without its samples, on images of its seed; a part of them is held out, and
--validation_ablation measures the model on them at the end, and for the first seed at the beginning too. A run whose
figures are there is not repeated. The result goes to benchmarks/results/encoder_worth.{json,txt}.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from demo.compare_captions import fine_tune
from library.config.errors import exits_on_user_error
from library.training.validation_log import FILE_NAME
from quickstart import DemoSize

ROWS = {  # of the table: what is subtracted from the loss with both captions, by its name in the log
    "without L": "l",
    "without G": "g",
    "interaction": "interaction",
    "L of another image": "own_l",
    "G of another image": "own_g",
    "L and G exchanged": "order",
    "without the pooled vector": "pooled",
}
Line = dict[str, Any]


def measured(folder: Path) -> list[Line]:
    """Return the figures that a finished run has logged, in the order of its steps; none where there is no run."""
    if not (folder / "output" / "finetuned_model.safetensors").is_file():
        return []
    files = sorted((folder / "logs").glob(f"*/{FILE_NAME}"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, size: DemoSize, split: float, seed: int, *, joint: bool, at_first: bool) -> list[Line]:
    """Fine-tune, unless that was done before, and return the figures."""
    if not measured(folder):
        flags = [f"--validation_split={split}", "--validation_ablation"]
        flags += [f"--validate_every_n_steps={size.num_steps}", *(["--validate_at_first"] if at_first else [])]
        fine_tune(folder, size, flags, seed, joint=joint)
    return measured(folder)


def cell(line: Line, name: str) -> str:
    """Return a difference with its standard error over images, and its share of the loss."""
    difference = line["worth"][name]
    share = difference["mean"] / line["losses"]["loss"]
    return f"{difference['mean']:+.4f} +- {difference['standard_error']:.4f} ({share:+.0%})"


def table(columns: Mapping[str, Sequence[Line]]) -> str:
    """Return a Markdown table: a column for each kind of run, in each cell one line for each seed."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    losses = {name: [line["losses"]["loss"] for line in each] for name, each in columns.items()}
    shown = [f"**{mean(each):.4f}** ({', '.join(f'{loss:.4f}' for loss in each)})" for each in losses.values()]
    lines.append(f"| loss with both captions | {' | '.join(shown)} |")
    for row, name in ROWS.items():
        cells = []
        for each in columns.values():
            average = mean(line["worth"][name]["mean"] for line in each)
            cells.append(f"**{average:+.4f}**<br>{'<br>'.join(cell(line, name) for line in each)}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_steps", type=int, default=DemoSize.num_steps)
    parser.add_argument("--num_pictures", type=int, default=120, help="images of each set, those held out included")
    parser.add_argument("--split", type=float, default=0.2, help="fraction of the images that is held out")
    parser.add_argument("--at_once", type=int, default=1, help="fine-tunes to run in parallel")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = DemoSize(arguments.num_steps, arguments.num_pictures)

    def one(seed: int, joint: bool) -> list[Line]:
        folder = arguments.folder / f"{'joint' if joint else 'separate'}-{seed}"
        return run(folder, size, arguments.split, seed, joint=joint, at_first=seed == arguments.seeds[0])

    each = [(seed, joint) for seed in arguments.seeds for joint in (False, True)]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        figures = dict(zip(each, pool.map(one, *zip(*each, strict=True)), strict=True))
    first = arguments.seeds[0]
    columns = {
        "before, separate captions": [figures[first, False][0]],
        "before, joint caption": [figures[first, True][0]],
        "fine-tuned, separate captions": [figures[seed, False][-1] for seed in arguments.seeds],
        "fine-tuned, joint caption": [figures[seed, True][-1] for seed in arguments.seeds],
    }
    machine = ceilings.machine()
    text = table(columns)
    result = {"machine": machine, "steps": size.num_steps, "seeds": arguments.seeds, "figures": columns}
    write_result(arguments.results / "encoder_worth", result, f"{machine_line(machine)}\n\n{text}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
