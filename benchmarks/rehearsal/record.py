"""Rehearse every case but the bench on a small network, and write what tests/benchmarks compares a step with.

    python benchmarks/rehearsal/record.py tests/benchmarks/rehearsed_steps.json

Run it after a change that is meant to alter launches, waits, copies or memory, and look at the difference.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere, find library/

from benchmarks.rehearsal.cases import OF_BENCH, cases
from benchmarks.rehearsal.rehearsed_run import rehearse
from benchmarks.rehearsal.stand_in import why_not

RECORDED = ("kernels", "products", "waits", "copies", "peak_mib", "samples")


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the JSON file to write")
    path: Path = parser.parse_args(argv).path
    reason = why_not()
    if reason is not None:
        print(f"no rehearsal: {reason}", file=sys.stderr)
        return 2
    found = {}
    for name, case in cases().items():
        if name.startswith(OF_BENCH):
            continue
        figures = rehearse(case, "small")
        if "note" in figures:
            print(f"{name}: {figures['note']}", file=sys.stderr)
            return 1
        found[name] = {key: figures[key] for key in RECORDED if figures[key]}
    lines = [f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in found.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
