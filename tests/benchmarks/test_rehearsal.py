"""The training step, rehearsed on a GPU that is not there: a launch, a wait or a copy more is noticed."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.rehearsal.cases import OF_BENCH, cases, documented_recipes
from benchmarks.rehearsal.stand_in import why_not
from benchmarks.training_step import VARIANTS

ROOT = Path(__file__).parents[2]
RECORDED = json.loads(Path(__file__).with_name("rehearsed_steps.json").read_text(encoding="utf-8"))
USUAL = "8 GB"

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.heavy]


def rehearsed(tmp_path: Path, *names: str) -> dict[str, dict]:
    """The figures of these cases, from another process: the thread of a GPU that is not there cannot be ended."""
    command = [sys.executable, str(ROOT / "benchmarks" / "rehearsal" / "table.py"), "--cases", *names]
    ended = subprocess.run(
        [*command, "--model_size=small", f"--output={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict] = json.loads((tmp_path / "rehearsal_small.json").read_text(encoding="utf-8"))["cases"]
    return found


def assert_as_recorded(name: str, found: Mapping, recorded: Mapping) -> None:
    """No wait, no copy and no matrix product more or less; launches and memory within one percent."""
    assert "note" not in found, (name, found)
    for key in recorded.keys() & {"waits", "copies", "products"}:
        assert found[key] == recorded[key], (name, key)
    assert found["kernels"].keys() == recorded["kernels"].keys(), name
    for phase, count in recorded["kernels"].items():
        assert found["kernels"][phase] == pytest.approx(count, rel=0.01), (name, phase)


def test_every_recipe_of_the_page_and_every_variation_is_recorded():
    assert {"8 GB", "12 GB", "16 GB", "24 GB", "24 GB with AdamW", "80 GB"} <= documented_recipes().keys()
    assert RECORDED.keys() == {name for name in cases() if not name.startswith(OF_BENCH)}


def test_a_step_launches_waits_copies_and_takes_memory_as_recorded(tmp_path: Path):
    compare(rehearsed(tmp_path, USUAL))


@pytest.mark.slow
def test_so_does_a_step_of_every_other_recipe_and_variation(tmp_path: Path):
    compare(rehearsed(tmp_path, *(name for name in RECORDED if name != USUAL)))


def compare(figures: Mapping[str, Mapping]) -> None:
    for name, found in figures.items():
        recorded = RECORDED[name]
        assert_as_recorded(name, found, recorded)
        assert found["peak_mib"] == pytest.approx(recorded["peak_mib"], rel=0.01), name
        assert bool(found["samples"]) == ("samples" in recorded), name
        if found["samples"]:
            assert_as_recorded(f"{name}: a sample", found["samples"], recorded["samples"])


@pytest.mark.slow
def test_every_variant_of_the_bench_runs_on_a_card_it_has_never_seen(tmp_path: Path):
    figures = rehearsed(tmp_path, *(f"{OF_BENCH}{variant}" for variant in VARIANTS))
    assert {name: found["note"] for name, found in figures.items() if "note" in found} == {}
    assert all(found["kernels"]["forward"] > 0 for found in figures.values())
