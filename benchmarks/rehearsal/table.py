"""Rehearse training steps on a GPU that is not there, and write the table of their memory, launches and waits.

    python benchmarks/rehearsal/table.py                                   every case at full size: minutes for each
    python benchmarks/rehearsal/table.py --model_size tiny --cases "8 GB"  the same counts, in seconds
    python benchmarks/rehearsal/table.py --output FOLDER

Rows of other cases that the table already has are kept, so that it can be made in parts.
No GPU is needed and none is measured: times are not known, and memory is without the CUDA context, the workspaces of
cuBLAS and cuDNN, and what the allocator loses in fragments. A case that fails is a row that says why.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, find library/

import torch

from benchmarks.rehearsal.cases import cases
from benchmarks.rehearsal.models import MODELS
from benchmarks.rehearsal.rehearsed_run import rehearse
from benchmarks.rehearsal.stand_in import why_not
from benchmarks.result_files import RESULTS, write_result

_PHASES = ("forward", "backward", "optimizer")
LEGEND = """
peak: GiB allocated by torch in a step, after the first; weights, gradients, state, rest: its parts. before: the peak
before the first step; samples: that of a sample image. Launches are kernels, estimated from those of each operation, of
the last step. waits: how often the host waits for the GPU; copies: between both. casts: changes of precision.
"""
_HEADINGS = ("case", "peak", "weights", "gradients", "state", "rest", "before", "samples", *_PHASES, "other", "waits")


def row_of(name: str, figures: Mapping[str, Any]) -> list[str]:
    """Return the cells of a case."""
    if "note" in figures:
        return [name, figures["note"]]
    parts = figures["parts_at_peak_gib"]
    weights = sum(parts.get(network, 0) for network in ("U-Net", "VAE", "L", "G"))
    named = weights, parts.get("gradients", 0), parts.get("optimizer", 0)
    kernels = figures["kernels"]
    launches = [kernels.get(phase, 0) for phase in _PHASES]
    return [
        name,
        f"{figures['peak_gib']:.2f}",
        *(f"{part:.2f}" for part in named),
        f"{figures['peak_gib'] - sum(named):.2f}",
        f"{figures['before_steps_peak_gib']:.2f}",
        f"{figures['samples']['peak_gib']:.2f}" if figures["samples"] else "",
        *map(str, launches),
        str(sum(kernels.values()) - sum(launches)),
        str(sum(figures["waits"].values())),
    ]


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all cases."""
    rows = [list(_HEADINGS), *(row_of(name, figures) for name, figures in found.items())]
    lines = [f"{row[0]:34}" + " ".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, LEGEND])


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = cases()
    parser.add_argument("--cases", nargs="+", choices=known, default=list(known))
    parser.add_argument("--model_size", choices=MODELS, default="full")
    parser.add_argument("--num_steps", type=int, help="steps of each run; its default is two, and the last is shown")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table and JSON")
    arguments = parser.parse_args(argv)
    reason = why_not()
    if reason is not None:
        print(f"no rehearsal: {reason}", file=sys.stderr)
        return 2
    stem = arguments.output / f"rehearsal_{arguments.model_size}"
    found = rows_before(stem)
    for name in arguments.cases:
        case = known[name]
        steps = arguments.num_steps or case.num_steps
        found[name] = rehearse(replace(case, num_steps=steps), arguments.model_size)
        print(" ".join(row_of(name, found[name])), flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        ordered = {name: found[name] for name in known if name in found}
        write_result(stem, {"model_size": arguments.model_size, **versions, "cases": ordered}, table_of(ordered))
    print(table_of(ordered))
    return 0


def rows_before(stem: Path) -> dict[str, Any]:
    """Return the figures of the table that is there, by case."""
    path = stem.with_name(f"{stem.name}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
