"""The comparison of separate captions with joint ones: what is trained, measured and written."""

import json
from dataclasses import replace

import pytest

from demo.classifier import Reading
from demo.compare_captions import CASES, details_table, fine_tune, main, table
from demo.figures import Readings
from library.config.errors import UserError
from quickstart import DemoSize


def captions(images):
    """The caption for L and that for G of each picture of a folder."""
    return [
        (path.with_suffix(".txt").read_text(encoding="utf-8"), path.with_suffix(".caption").read_text(encoding="utf-8"))
        for path in sorted(images.glob("*.png"))
    ]


@pytest.mark.trains
@pytest.mark.slow  # two fine-tunings and two drawn sets
def test_the_comparison_trains_with_both_kinds_of_captions_and_measures_every_case(tmp_path, capfd):
    folder = tmp_path / "my comparison"
    line = [str(folder), "--seeds=0", "--num_steps=1", "--num_pictures=6", "--scenes_per_pair=1", "--at_once=2"]
    assert main([*line, "--training_flags=--learning_rate=1e-12 --learning_rate_te1=1e-12"]) == 0

    separate, joint = captions(folder / "separate-0" / "images"), captions(folder / "joint-0" / "images")
    assert all(style != content for style, content in separate)
    assert all(for_l == for_g for for_l, for_g in joint)
    assert [f"{style.strip()}, {content}" for style, content in separate] == [g for _, g in joint]  # the same pictures

    written = (folder / "figures.md").read_text(encoding="utf-8")
    assert written in capfd.readouterr().out
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["0"]
    assert figures.keys() == CASES.keys()
    # Rates too small to change a float16: the figures after it are those of the base model.
    assert figures["separate captions, separate prompts"] == figures["before, separate prompts"]
    assert figures["joint caption, joint prompt"] == figures["before, joint prompt"]


def test_a_script_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"sdxl_merge_captions_g_to_metadata\.py' for '.*' ended with exit status 2"):
        fine_tune(tmp_path, DemoSize(num_steps=1, num_pictures=0), [], seed=0, joint=False)


def test_the_tables_have_the_mean_over_the_seeds():
    want = Reading("star", "red", "left", "white", "framed")
    readings = {
        0: Readings([want], [want], [replace(want, colour="blue")], [replace(want, style="plain")]),
        1: Readings([want], [replace(want, style="plain")], [want], [replace(want, style="plain", shape="circle")]),
    }
    by_seed = {seed: dict.fromkeys(CASES, each) for seed, each in readings.items()}
    rows = table(by_seed).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == list(CASES)
    assert rows[2].endswith("| **50%** (100%, 0%) | **100%** (100%, 100%) | **12%** (25%, 0%) | **50%** (100%, 0%) |")
    details = details_table(by_seed)
    assert f"| style right: framed |{' 50% |' * len(CASES)}" in details
    assert f"| shape right |{' 100% |' * len(CASES)}" in details
    assert f"| colour changed |{' 50% |' * len(CASES)}" in details


@pytest.mark.parametrize("flag", ["--num_pictures=0", "--scenes_per_pair=0", "--at_once=0"])
def test_a_number_that_cannot_work_is_refused_before_anything_is_trained(flag, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "my set"), flag])
    assert f"{flag.partition('=')[0]} is 0; it must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "my set").exists()
