"""The training step, rehearsed on a GPU that is not there: a launch, a wait or a copy more is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rehearsal.cases import documented_recipes
from benchmarks.rehearsal.stand_in import why_not
from benchmarks.training_step import VARIANTS

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("rehearsed_steps.json")

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.heavy]


def rehearsed(tmp_path: Path, model_size: str, *cases: str) -> dict[str, dict]:
    """The figures of these cases, from a process of its own: the thread of a GPU that is not there cannot be ended."""
    command = [sys.executable, str(ROOT / "benchmarks" / "rehearsal" / "table.py"), "--cases", *cases]
    ended = subprocess.run(
        [*command, f"--model_size={model_size}", f"--output={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    content = json.loads((tmp_path / f"rehearsal_{model_size}.json").read_text(encoding="utf-8"))
    found: dict[str, dict] = content["cases"]
    return found


def test_every_recipe_of_the_page_is_a_case():
    assert {"8 GB", "12 GB", "16 GB", "24 GB", "24 GB with AdamW", "80 GB"} <= documented_recipes().keys()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_bench_runs_on_a_card_it_has_never_seen(variant: str, tmp_path: Path):
    figures = rehearsed(tmp_path, "small", f"bench: {variant}")[f"bench: {variant}"]
    assert "note" not in figures, figures
    assert figures["kernels"]["forward"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", json.loads(RECORDED.read_text(encoding="utf-8")))
def test_a_step_launches_waits_and_copies_as_recorded(case: str, tmp_path: Path):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[case]
    figures = rehearsed(tmp_path, "small", case)[case]
    assert "note" not in figures, figures
    for exact in ("waits", "copies", "products"):
        assert figures[exact] == recorded[exact], exact
    for phase, count in recorded["kernels"].items():
        assert figures["kernels"][phase] == pytest.approx(count, rel=0.01), phase
    assert figures["kernels"].keys() == recorded["kernels"].keys()
