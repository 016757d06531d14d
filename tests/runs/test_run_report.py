"""The record that a run leaves in its output folder, and the page that finetune/run_report.py makes of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from torch.utils.tensorboard import SummaryWriter

import sdxl_train
from finetune import run_report
from library.data.training_set_options import TrainingSetOptions
from library.runs.curves import Curve, read_curves, thinned
from library.training.hub_options import HubOptions
from library.training.run_record import (
    ELSEWHERE,
    FAILED,
    FINISHED,
    RECORD_FOLDER,
    RUNS,
    STOPPED,
    VANISHED,
    RecordFile,
    RunRecord,
    Start,
    changed_values,
    find_records,
)

PROMPTS = "a cat <script>alert(1)</script> --e close-up --w 64 --h 64 --s 1\na cup --e still life --w 64 --h 64 --s 1\n"


@pytest.fixture(scope="module")
def run(train, tmp_path_factory: pytest.TempPathFactory):
    """Three steps with samples, a grid, a saved state, and validation with an ablation."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    return train(
        *(f"--sample_prompts={prompts}", "--sample_at_first", "--sample_every_n_steps=2", "--sample_grid"),
        *("--save_every_n_steps=2", "--save_state", "--save_last_n_steps=1"),
        *("--validation_split=0.85", "--validation_seed=1", "--validation_ablation", "--validate_every_n_steps=1"),
        *("--validation_timesteps", "300", "800"),
    )


@pytest.fixture(scope="module")
def page(run) -> str:
    assert run_report.main([str(run.output), "--image_side=64"]) == 0
    return (run.output / "run_report.html").read_text(encoding="utf-8")


class Cells(HTMLParser):
    """The rows of all tables of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def value(self, name: str) -> str:
        [found] = [row[1] for row in self.rows if row[0] == name]
        return found


def test_a_run_leaves_a_record_of_itself(run):
    [path] = (run.output / RECORD_FOLDER).iterdir()
    [record] = find_records(run.output)
    assert path.name == f"{record.name}.json" and record.name.endswith("_m")
    assert (record.state, record.end.step, record.seed, record.output_name) == (FINISHED, 3, 7, "m")
    assert [start.step for start in record.starts] == [0]
    assert record.options["learning_rate"] == json.loads(path.read_text(encoding="utf-8"))["options"]["learning_rate"]
    assert "lr_warmup_steps" not in record.options  # left at its default
    assert (record.set["images"], record.set["held_out"], record.set["steps"]) == (1, 2, 3)
    assert record.captions == {"l": "meta_lat.json", "g": "meta_lat.json"}
    assert Path(record.log_folder).parent == run.logs


@pytest.mark.slow  # two runs
def test_a_resumed_run_goes_on_with_its_record(run, tmp_path: Path):
    output = tmp_path / "output"
    shutil.copytree(run.output, output)
    argv = [flag for flag in run.argv if not flag.startswith("--output_dir")]
    more = [f"--output_dir={output}", "--resume=latest", "--max_train_steps=4"]
    assert sdxl_train.main([*argv, *more]) == 0
    [record] = find_records(output)
    assert [start.step for start in record.starts] == [0, 3]
    assert (record.state, record.end.step) == (FINISHED, 4)


def test_options_are_recorded_as_a_toml_file_has_them_without_secrets():
    hub = HubOptions(huggingface_repo_id="me/model", huggingface_token="hf_secret")
    prior = TrainingSetOptions(train_data_dir=Path("my set"), dataset_repeats=2)
    found = changed_values(SimpleNamespace(hub=hub, set=prior))
    assert found["huggingface_repo_id"] == "me/model" and "hf_secret" not in str(found)
    assert (found["train_data_dir"], found["dataset_repeats"]) == ("my set", 2)


def test_the_page_shows_what_the_run_was_and_did(run, page: str):
    cells = Cells(page)
    [record] = find_records(run.output)
    assert {f"--{name}" for name in record.options} <= {row[0] for row in cells.rows if row}
    assert cells.value("--optimizer_type") == "torch.optim.SGD"
    assert cells.value("images") == "1"
    assert cells.value("m-step00000002-state").endswith("MiB")
    lines = [json.loads(text) for text in next(run.logs.glob("*/validation.jsonl")).read_text().splitlines()]
    assert cells.value("worth of l") == f"{lines[-1]['worth']['l']['mean']:.4f}"
    assert cells.value("without_g") == f"{lines[-1]['losses']['without_g']:.4f}"
    for title in ("Loss", "Loss on images that are not trained", "What each encoder is worth", "Learning rates"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert page.count("<polyline") >= 4
    assert "step 2: saved" in cells.text and "step 2: samples" in cells.text
    assert cells.text.count("finished") >= 1


def test_the_page_needs_nothing_else_and_escapes_what_files_say(page: str):
    assert page.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count('src="data:image/jpeg;base64,') == 2 * 2 + 2  # two prompts at two steps, two grids


@pytest.mark.heavy
def test_one_slider_moves_all_samples(run, page: str, tmp_path: Path, browsed):
    moved = tmp_path / "moved.html"
    move = "<script>slider.value = 0; slider.dispatchEvent(new Event('input'));</script></body>"
    moved.write_text(page.replace("</body>", move), encoding="utf-8")
    shown = browsed(moved)
    addresses = dict(re.findall(r'id="(s\d+-\d+)" src="([^"]+)"', shown))
    figures = dict(re.findall(r'data-row="(s\d+)" alt="" src="([^"]+)"', shown))
    assert figures == {"s0": addresses["s0-0"], "s1": addresses["s1-0"]}
    assert '<output id="shown-step">0</output>' in shown


# -- how a run stands -------------------------------------------------------------------------------------------------


def record(**fields) -> RunRecord:
    return RunRecord(**{"started": "2026-11-28T12:00:00", "output_name": "m", "seed": 1, **fields})


class Place:
    step = 5


def test_the_record_tells_a_run_that_goes_on_from_one_that_was_killed(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    created = psutil.Process(child.pid).create_time()
    start = replace(Start.now(0), pid=child.pid, created=created)
    assert record(starts=(start,)).state == RUNS
    assert record(starts=(replace(start, created=created - 60),)).state == VANISHED  # its number is another's now
    assert record(starts=(replace(start, host="another"),)).state == ELSEWHERE
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert record(starts=(start,)).state == VANISHED


def test_the_record_tells_how_a_run_ended(tmp_path: Path):
    file = RecordFile(tmp_path, record(), Place(), is_writer=True)
    with pytest.raises(MemoryError), file.kept():
        assert find_records(tmp_path)[0].state == RUNS
        raise MemoryError("no memory\nmore lines")
    [found] = find_records(tmp_path)
    assert (found.state, found.end.step, found.end.message) == (FAILED, 5, "no memory")
    with file.kept():
        file.end(STOPPED)
    [found] = find_records(tmp_path)
    assert (found.state, len(found.starts), found.end.message) == (STOPPED, 2, "")


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path):
    file = RecordFile(tmp_path, record(), Place(), is_writer=False)
    with file.kept():
        file.end(FINISHED)
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / RECORD_FOLDER).write_text("a file in the way")
    with RecordFile(tmp_path, record(), Place(), is_writer=True).kept():
        pass
    assert "training continues" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "starts": 3}', "\x00"])
def test_records_that_are_damaged_are_named_and_left_out(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / RECORD_FOLDER
    folder.mkdir()
    (folder / "1.json").write_text(text, encoding="utf-8")
    (folder / "2.json").write_text(record().as_text(), encoding="utf-8")
    assert [found.seed for found in find_records(tmp_path)] == [1]
    assert "1.json" in caplog.text


# -- what cannot be shown ---------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_told_apart(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run.output, tmp_path / "output")
    [old] = find_records(run.output)
    later = replace(old, started="2099-01-01T00:00:00", seed=8, log_folder=None, options={"seed": 8})
    (tmp_path / "output" / RECORD_FOLDER / f"{later.name}.json").write_text(later.as_text(), encoding="utf-8")
    assert run_report.main([str(tmp_path / "output")]) == 0
    newest = Cells((tmp_path / "output" / "run_report.html").read_text(encoding="utf-8"))
    assert newest.value("--seed") == "8"
    assert not [row for row in newest.rows if row[0].startswith("m-step")]  # those are of the earlier run
    assert "--logging_dir writes them" in newest.text
    assert "the newest of 2 runs" in capsys.readouterr().out
    older = tmp_path / "older.html"
    assert run_report.main([str(tmp_path / "output"), f"--run={old.name}", f"--output={older}"]) == 0
    assert "m-step00000002-state" in older.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "holds no record of a run"),
        (("--logging_dir=nowhere",), "there is no folder 'nowhere'"),
        (("--num_columns=0",), "--num_columns"),
    ],
)
def test_what_cannot_be_reported_is_one_line(flags, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_report.main([str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_an_unknown_run_is_named_beside_those_that_exist(run, capsys: pytest.CaptureFixture[str]):
    assert run_report.main([str(run.output), "--run=x"]) == 2
    assert find_records(run.output)[0].name in capsys.readouterr().err


# -- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_read_as_tensorboard_shows_them(tmp_path: Path):
    with SummaryWriter(str(tmp_path)) as first:
        for step in range(1, 6):
            first.add_scalar("loss", step, step)
    with SummaryWriter(str(tmp_path), purge_step=4, filename_suffix=".2") as second:
        second.add_scalar("loss", 40, 4)
    curve = read_curves(tmp_path)["loss"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 40.0])


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-60] + b"\xff" * 60])
def test_an_event_file_that_is_damaged_is_read_as_far_as_it_goes(damage, tmp_path: Path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("loss", step, step)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    steps = read_curves(tmp_path)["loss"].steps.tolist()
    assert steps and steps == list(range(1, len(steps) + 1)) and len(steps) < 5


def test_a_thinned_curve_keeps_its_extremes_and_its_ends():
    values = np.sin(np.arange(100_003) / 500)
    values[[700, 90_001]] = 50, -50
    few = thinned(Curve(np.arange(len(values)), values), 1000)
    assert len(few.steps) < 1300
    assert (few.steps[0], few.steps[-1]) == (0, len(values) - 1)
    assert {700, 90_001} <= set(few.steps.tolist())
    assert (np.diff(few.steps) > 0).all()
