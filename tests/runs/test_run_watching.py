"""Runs found by what they left, and read while they write: curves, pace, marks, logs."""

import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from library.config.errors import UserError
from library.runs.control import options_of_run, options_to_resume, save_now, stop
from library.runs.curves import Curve, CurveFiles, read_curves, within
from library.runs.folders import FoundRun, RunFolders, runs_in
from library.runs.launch import LAUNCH_FOLDER, Launch, _reserved_name, find_launches, launch
from library.runs.log import last_bar, last_words, read_log_end
from library.runs.watch import RunWatch, as_json
from library.training.event_files import events_of
from library.training.run_record import FAILED, RECORD_FOLDER, RUNS, VANISHED, End, Start
from tests.studio.written_runs import BEGAN, event_bytes, scalar, start_of_log, write_curves, write_run


def by_protobuf(file: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(file):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_curves_are_those_that_protobuf_reads(tmp_path: Path):
    file = write_curves(tmp_path, 3000)
    found = {name: list(zip(curve.steps, curve.values, strict=True)) for name, curve in read_curves(tmp_path).items()}
    assert found == by_protobuf(file)
    assert len(found["loss/current"]) == 3000


def test_records_of_other_layouts_are_read_too(tmp_path: Path):
    two = Summary(value=[Summary.Value(tag="a", simple_value=1), Summary.Value(tag="b", simple_value=2)])
    long_name = "x" * 200
    image = Summary(value=[Summary.Value(tag="p", image=Summary.Image(encoded_image_string=bytes(9000)))])
    records = [
        event_bytes(Event(wall_time=1.0, file_version="brain.Event:2")),
        scalar("loss", 0, 0.5),  # protobuf leaves a step of 0 out
        event_bytes(Event(wall_time=1.0, step=1, summary=two)),
        event_bytes(Event(wall_time=1.0, step=1, summary=image)),
        scalar(long_name, 3, 3),
        scalar("loss", 2**33, math.nan),
        scalar("é", 7, -1),
    ]
    (tmp_path / "events.tfevents").write_bytes(b"".join(records))
    curves = read_curves(tmp_path)
    assert {name: curve.steps.tolist() for name, curve in curves.items()} == {
        "loss": [0, 2**33],
        "a": [1],
        "b": [1],
        long_name: [3],
        "é": [7],
    }
    assert as_json(curves["loss"])["values"] == [0.5, None]


def test_a_file_is_read_on_where_it_ended_even_within_a_record(tmp_path: Path):
    whole = b"".join(scalar("loss", step, step) + scalar("lr/unet", step, 1) for step in range(1, 400))
    file, draw = tmp_path / "events.tfevents", random.Random(1)
    cuts = [0, *sorted(draw.sample(range(len(whole)), 12)), len(whole)]
    files = CurveFiles(tmp_path)
    for first, last in pairwise(cuts):
        with file.open("ab") as log:
            log.write(whole[first:last])
        files.refresh()
        if "loss" in files.names():
            assert (np.diff(files.curve("loss").steps) == 1).all()
    assert files.curve("loss").steps.tolist() == list(range(1, 400))
    assert files.unread() == {}


@pytest.mark.parametrize("place", [0, 1, 8, 13, 30, 61, 200])
def test_a_damaged_file_is_read_as_far_as_it_goes_and_no_further(place: int, tmp_path: Path):
    records = [scalar("loss", step, 1) for step in range(1, 11)]
    data = bytearray(b"".join(records))
    data[place] ^= 0xFF
    (tmp_path / "events.tfevents").write_bytes(data)
    files = CurveFiles(tmp_path)
    files.refresh()
    files.refresh()
    steps = files.curve("loss").steps.tolist() if files.names() else []
    sound = place // len(records[0])
    assert set(range(1, sound + 1)) <= set(steps)
    assert files.damaged or files.unread() or len(steps) in (9, 10)


def test_a_resumed_run_hides_what_was_logged_after_its_state(tmp_path: Path):
    files = CurveFiles(tmp_path)
    first = b"".join(scalar("loss", step, 1) for step in range(1, 9))
    (tmp_path / "a.tfevents.1").write_bytes(first)
    files.refresh()
    again = start_of_log(5) + b"".join(scalar("loss", step, 2) for step in (5, 6, 6))
    (tmp_path / "a.tfevents.2").write_bytes(again)
    files.refresh()
    assert files.curve("loss").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert files.curve("loss").values.tolist() == [1, 1, 1, 1, 2, 2]
    (tmp_path / "a.tfevents.1").write_bytes(scalar("loss", 1, 7))  # another log in its place
    (tmp_path / "a.tfevents.2").unlink()
    files.refresh()
    assert files.curve("loss").values.tolist() == [7]


def test_a_stretch_of_a_curve_has_a_point_on_each_side():
    curve = Curve(np.arange(0, 100, 10), np.arange(10.0))
    assert within(curve, 25, 45).steps.tolist() == [20, 30, 40, 50]
    assert within(curve, None, 5).steps.tolist() == [0, 10]
    assert within(curve, 95, None).steps.tolist() == [90]


def found(folder: Path, **how: object) -> FoundRun:
    write_run(folder, **how)  # type: ignore[arg-type]
    [run], problems = runs_in(folder)
    assert problems == []
    return run


def test_pace_and_marks_of_a_run_that_goes_on(tmp_path: Path):
    run = found(tmp_path, num_steps=100, has_end=False)
    assert run.state == RUNS and run.record is not None and run.record.log_folder is not None
    record = replace(run.record, set={"steps": 300})
    watch = RunWatch(Path(run.record.log_folder))
    assert watch.refresh() is None
    pace = watch.pace(replace(run, record=record))
    assert (pace.step, pace.num_steps) == (100, 300)
    assert pace.seconds_left == pytest.approx(200)  # a step a second
    marks = watch.marks(run)
    assert (marks["spike"], marks["saved"], marks["not finite"]) == ([50], [50], [])
    with (Path(run.record.log_folder) / "b.tfevents").open("wb") as log:
        log.write(scalar("loss/current", 101, math.nan) + scalar("grad_norm", 101, 500))
    assert watch.refresh() is None
    assert (watch.marks(run)["spike"], watch.marks(run)["not finite"]) == ([50, 101], [101])


def test_what_is_wrong_with_logs_is_said(tmp_path: Path):
    run = found(tmp_path, num_steps=10)
    assert run.record is not None and run.record.log_folder is not None
    [file] = Path(run.record.log_folder).iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = b"\xff" * 8 + bytes(len(data))
    data += event_bytes(Event(wall_time=1, step=1))
    file.write_bytes(data)
    watch = RunWatch(file.parent)
    watch.refresh()
    assert 0 < len(watch.curve("loss/current", None, None, 100).steps) < 10  # type: ignore[union-attr]
    file.unlink()
    file.parent.rmdir()
    assert "are not there" in str(watch.refresh())


def test_two_runs_in_one_folder_and_one_that_was_killed(tmp_path: Path):
    write_run(tmp_path, "m", sample_steps=[0, 10])
    write_run(tmp_path, "m", began=BEGAN + timedelta(hours=1), sample_steps=[0], has_end=False, pid=999_999)
    folders = RunFolders([tmp_path])
    runs, problems = folders.runs()
    assert [run.state for run in runs] == [VANISHED, "finished"]
    assert len({run.id for run in runs}) == 2 and problems == []
    assert folders.run(runs[1].id) == runs[1]
    assert folders.run("0" * 16) is None
    with pytest.raises(UserError, match="has ended: vanished"):
        stop(runs[0])


def test_records_that_are_none_are_named_and_others_shown(tmp_path: Path):
    write_run(tmp_path / "deep" / "er", sample_steps=[])
    (tmp_path / "deep" / "er" / RECORD_FOLDER / "bad.json").write_text('{"format": 1}', encoding="utf-8")
    (tmp_path / "other" / RECORD_FOLDER).mkdir(parents=True)
    (tmp_path / "other" / RECORD_FOLDER / "notes.json").write_text("[1]", encoding="utf-8")
    runs, problems = RunFolders([tmp_path, tmp_path / "gone"]).runs()
    assert len(runs) == 1 and len(problems) == 3
    assert "'" + str(tmp_path / "gone") + "' is not there" in problems


def test_a_folder_is_listed_once_and_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "output", sample_steps=[])
    write_run(tmp_path / ".hidden", sample_steps=[])
    monkeypatch.chdir(tmp_path)
    folders = RunFolders([tmp_path, Path()])
    folders.add(Path("output"))
    assert len(folders.runs()[0]) == 1
    folders.add(Path(".hidden"))
    assert len(folders.runs()[0]) == 2
    assert folders.run("0" * 16) is None  # after the folders are walked through again
    assert len(folders.runs()[0]) == 2


def test_a_folder_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "mine", sample_steps=[])
    closed = tmp_path / "theirs" / RECORD_FOLDER
    closed.mkdir(parents=True)
    read = Path.iterdir

    def refusing(folder: Path):
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return read(folder)

    monkeypatch.setattr(Path, "iterdir", refusing)
    assert len(RunFolders([tmp_path]).runs()[0]) == 1


def test_a_save_that_is_replaced_while_it_is_looked_at_is_left_out(tmp_path: Path):
    run = found(tmp_path, has_end=False)
    saved = RunWatch(None).marks(run)["saved"]
    (tmp_path / "m-step00000070.safetensors").symlink_to(tmp_path / "gone")
    assert RunWatch(None).marks(run)["saved"] == saved != []


def test_a_run_is_asked_by_its_files(tmp_path: Path):
    run = found(tmp_path, name="my run", has_end=False)
    stop(run)
    save_now(run)
    assert sorted(path.name for path in tmp_path.glob("s*-my run")) == ["save-my run", "stop-my run"]
    with pytest.raises(UserError, match="has not ended"):
        options_to_resume(run)


def test_what_a_run_was_told_is_repeated_without_what_it_did_once(tmp_path: Path):
    options = {"learning_rate": 1e-5, "config_file": "x.toml", "resume": "latest", "output_dir": "elsewhere"}
    run = found(tmp_path, options=options, has_end=True, end=End(BEGAN.isoformat(), 3, "stopped"))
    assert options_of_run(run) == {"learning_rate": 1e-5, "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="left no state"):
        options_to_resume(run)


def test_a_run_that_cannot_work_is_started_and_says_why(tmp_path: Path):
    made = launch(tmp_path, {"output_dir": str(tmp_path), "learning_rate": -1, "output_name": "bad"})
    process = made.start.process()
    if process is not None:
        process.wait(60)
    [run], _ = runs_in(tmp_path)
    assert (run.state, run.output_name, run.record) == (FAILED, "bad", None)
    assert "--learning_rate is -1" in run.message
    assert options_of_run(run)["learning_rate"] == -1
    (tmp_path / RECORD_FOLDER / LAUNCH_FOLDER / "half.json").write_text("{", encoding="utf-8")
    assert find_launches(tmp_path) == [made]
    with pytest.raises(UserError, match="cannot write"):
        launch(tmp_path / RECORD_FOLDER / LAUNCH_FOLDER / "half.json", {})


def test_starts_of_one_name_in_the_same_second_have_their_own_files(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: _reserved_name(tmp_path, "m"), range(32)))
    assert len(set(names)) == 32


def test_a_start_is_joined_with_its_record_by_its_process(tmp_path: Path):
    run = found(tmp_path, has_end=False)
    assert run.record is not None
    folder = tmp_path / RECORD_FOLDER / LAUNCH_FOLDER
    folder.mkdir()
    start = {**vars(run.record.starts[-1])}
    for name, pid in (("1_m", start["pid"]), ("2_other", 999_999)):
        content = {"format": 1, "name": name, "output_name": "m", "options": {}, "start": {**start, "pid": pid}}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    joined, alone = runs_in(tmp_path)[0]
    assert [each.name for each in joined.launches] == ["1_m"] and joined.state == RUNS
    assert (alone.record, alone.state) == (None, FAILED)
    assert RunFolders([tmp_path]).run(joined.ids[1]) == joined


def test_the_end_of_a_log_is_what_a_terminal_shows(tmp_path: Path):
    log = tmp_path / "run.log"
    log.write_bytes(b"loading\r\nsteps:   0%| | 0/9 [00:00<?]\rsteps:  22%|# | 2/9 [00:01<00:03]\nerror: no space\n\n")
    end = read_log_end(log, 10)
    assert end.lines == ["loading", "steps:  22%|# | 2/9 [00:01<00:03]", "error: no space"]
    assert (last_bar(end.lines), last_words(end.lines), end.is_whole) == ((2, 9), "error: no space", True)
    assert last_words(["saved", "steps: 100%|# | 9/9 [00:01<00:00]"]) == "saved"
    assert (last_bar(["images: 3/4 [0"]), last_words([])) == (None, "")
    log.write_bytes(b"x\n" * 300_000)
    end = read_log_end(log, 3)
    assert (end.lines, end.is_whole, end.size) == (["x"] * 3, False, 600_000)


def test_the_age_of_a_process_tells_it_from_another_of_its_number():
    start = Start.now(0)
    assert start.is_running and start.process().pid == os.getpid()  # type: ignore[union-attr]
    assert not replace(start, created=start.created - 60).is_running
    assert not start.is_of_process(replace(start, created=start.created - 60))
    assert isinstance(Launch("n", None, {}, start).log_file(Path("o")), Path)
    assert datetime.fromisoformat(start.time)
