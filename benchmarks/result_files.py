"""The results of a benchmark: figures as JSON, and a table as text beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config.atomic_files import write_text

RESULTS = Path(__file__).resolve().parent / "results"


def machine_line(machine: Mapping[str, str]) -> str:
    """Return what `ceilings.machine` found as the first line of a table."""
    return " ".join(f"{key}={value}" for key, value in machine.items())


def write_result(stem: Path, result: Mapping[str, Any], table: str) -> None:
    """Write `stem`.json and `stem`.txt. Raise `UserError` if they cannot be written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text(stem.with_name(f"{stem.name}.json"), json.dumps(result, indent=1) + "\n")
    write_text(stem.with_name(f"{stem.name}.txt"), table.rstrip("\n") + "\n")
