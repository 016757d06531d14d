"""When models are saved, how they are called, and what is removed when."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from library.config.atomic_files import replacing
from library.config.errors import UserError
from library.config.options import parse_options, problems_of
from library.training import checkpoints as checkpoints_room
from library.training.checkpoints import Checkpoints
from library.training.plan import Occasion
from library.training.progress import Progress
from library.training.saves import SaveOptions, epoch_to_remove, step_to_remove
from library.training.stopping import listening_for_stop

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "file_names.json").read_text(encoding="utf-8"))


def save_options(folder: Path, *flags: str) -> SaveOptions:
    (options,) = parse_options([SaveOptions], [f"--output_dir={folder}", *flags], description="")
    return options


def write_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a model", encoding="utf-8")


def write_folder(path: Path) -> None:
    write_file(path / "unet" / "weights")


def make_checkpoints(
    options: SaveOptions,
    suffix: str = "",
    write: Callable[[Path], None] = write_file,
    waiting=nullcontext,
    asked: Callable[[], bool] = bool,
    average=None,
) -> Checkpoints:
    return Checkpoints(
        options,
        Progress(),
        suffix=suffix,
        write_model=write,
        write_state=lambda folder, progress: write_folder(folder),
        write_average=average,
        one_writer=lambda: nullcontext(True),
        waiting=waiting,
        asked=asked,
    )


def after_step(checkpoints: Checkpoints, step: int, **occasion) -> None:
    checkpoints._progress.step = step
    checkpoints.after_step(Occasion(step, **occasion))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def drive(checkpoints: Checkpoints, sequence: list[dict]) -> Iterator[dict]:
    """Call the checkpoints as a run does for the events of the golden file, and yield each event when it has happened.

    There a step and the end of its epoch are two events, and the end of the run comes after the last epoch.
    """
    step = 0
    for event in sequence:
        if "after_step" in event:
            step = event["after_step"]
            after_step(checkpoints, step)
        elif "after_epoch" in event:
            if event["after_epoch"] != event["of"]:
                checkpoints._progress.step_in_epoch = 1  # the step itself was saved before: what is due is the epoch
                checkpoints.after_step(Occasion(max(step, 1), event["after_epoch"], is_resumed=True))
        else:
            checkpoints.after_step(Occasion(max(step, 1), is_last=True, is_resumed=True))
        yield event


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["title"])
def test_models_and_states_come_and_go_as_in_the_reference(case: dict, tmp_path: Path):
    options = save_options(tmp_path / "my output", *case["flags"])
    is_folder = case["title"].startswith("diffusers")
    made = make_checkpoints(options, "", write_folder) if is_folder else make_checkpoints(options, ".safetensors")
    for event in drive(made, case["sequence"]):
        assert names(options.output_dir) == event["files"], event


def test_without_an_output_name_files_are_called_as_in_the_reference(tmp_path: Path):
    checkpoints = make_checkpoints(save_options(tmp_path, "--save_every_n_steps=5", "--save_every_n_epochs=1"))
    after_step(checkpoints, 5, epoch_ended=1)
    after_step(checkpoints, 6, epoch_ended=2, is_last=True)
    assert names(tmp_path) == ["at-step00000005", "epoch-000001", "last"]


def test_nothing_is_saved_before_the_end_unless_asked_for(tmp_path: Path):
    checkpoints = make_checkpoints(save_options(tmp_path), ".ckpt")
    after_step(checkpoints, 10, epoch_ended=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "every", "keep", "removed"),
    [(10, 10, None, None), (40, 10, 30, None), (50, 10, 30, 10), (50, 10, 25, 20), (20, 10, 1, 10), (10, 10, 1, None)],
)
def test_a_model_goes_when_it_is_more_steps_old_than_are_kept(step, every, keep, removed):
    assert step_to_remove(step, every=every, keep=keep) == removed


@pytest.mark.parametrize(
    ("epoch", "every", "keep", "removed"), [(4, 1, None, None), (2, 1, 2, None), (3, 1, 2, 1), (6, 2, 2, 2)]
)
def test_as_many_epochs_stay_as_are_kept(epoch, every, keep, removed):
    assert epoch_to_remove(epoch, every=every, keep=keep) == removed


# -- on request, by the clock, by a share of the epochs ----------------------------------------------------------------


def test_what_is_asked_for_is_saved_with_a_state_and_stays(tmp_path: Path):
    asked = iter([False, True, False, False, True])
    options = save_options(tmp_path, "--output_name=m", "--save_every_n_steps=2", "--save_last_n_steps=1")
    checkpoints = make_checkpoints(options, asked=lambda: next(asked))
    for step in (1, 3, 4, 6):
        after_step(checkpoints, step)
    assert names(tmp_path) == ["m-step00000003", "m-step00000003-state", "m-step00000006"]
    after_step(checkpoints, 8)  # due anyway: with a state now
    assert names(tmp_path)[-2:] == ["m-step00000008", "m-step00000008-state"]
    assert list(checkpoints.written) == [tmp_path / name for name in names(tmp_path)]


def test_after_the_last_step_the_final_model_is_what_was_asked_for(tmp_path: Path):
    checkpoints = make_checkpoints(save_options(tmp_path, "--output_name=m"), asked=lambda: True)
    after_step(checkpoints, 3, is_last=True)
    assert names(tmp_path) == ["m", "m-state"]


class Clock:
    """A time that passes when it is told to."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


def test_every_n_minutes_model_and_state_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, saved = Clock(), []
    monkeypatch.setattr(checkpoints_room, "time", clock)
    options = save_options(tmp_path, "--output_name=m", "--save_every_n_minutes=10", "--save_every_n_epochs=1")
    options = replace(options, save_state=True)
    checkpoints = make_checkpoints(options, write=lambda path: (saved.append((path.name, step)), write_file(path))[1])
    times = {1: 9, 2: 10, 3: 19, 4: 20, 5: 30, 6: 39, 7: 40}
    for step, minutes in times.items():
        clock.seconds = 1000.0 + 60 * minutes
        after_step(checkpoints, step, epoch_ended=1 if step == 5 else None)
    # Step 5 saves a state with its epoch, and the minutes count from there.
    assert saved == [("m-recent", 2), ("m-recent", 4), ("m-000001", 5), ("m-recent", 7)]
    assert names(tmp_path) == ["m-000001", "m-000001-state", "m-recent", "m-recent-state"]


@pytest.mark.parametrize(
    ("num_epochs", "ratio", "every"), [(10, 5, 2), (10, 3, 3), (10, 4, 2), (3, 10, 1), (7, 7, 1), (9, None, 6)]
)
def test_a_ratio_is_the_epochs_between_saves_as_in_the_reference(num_epochs, ratio, every, tmp_path: Path):
    options = SaveOptions(tmp_path, save_every_n_epochs=6, save_n_epoch_ratio=ratio)
    assert options.for_epochs(num_epochs).save_every_n_epochs == every


def test_models_of_a_ratio_can_be_few(tmp_path: Path):
    assert list(SaveOptions(tmp_path, save_n_epoch_ratio=5, save_last_n_epochs=2).problems()) == []


# -- what happens when something goes wrong ---------------------------------------------------------------------------


def keep_one(folder: Path, write: Callable[[Path], None] = write_file) -> Checkpoints:
    return make_checkpoints(
        save_options(folder, "--output_name=m", "--save_every_n_steps=1", "--save_last_n_steps=1"), write=write
    )


def test_the_old_model_is_there_until_the_new_one_is_complete(tmp_path: Path):
    seen: list[list[str]] = []

    def write(path: Path) -> None:
        write_file(path)
        seen.append(names(tmp_path))

    checkpoints = keep_one(tmp_path, write)
    for step in (1, 2, 3):
        after_step(checkpoints, step)
    assert seen[-1] == ["m-step00000001", "m-step00000002", "m-step00000003"]
    assert names(tmp_path) == ["m-step00000002", "m-step00000003"]


def test_the_average_is_saved_beside_each_model_and_removed_with_it(tmp_path: Path):
    options = save_options(tmp_path, "--output_name=m", "--save_every_n_steps=1", "--save_last_n_steps=1")
    checkpoints = make_checkpoints(options, ".safetensors", average=write_file)
    for step in (1, 2, 3):
        after_step(checkpoints, step)
    after_step(checkpoints, 4, is_last=True)
    kept = [f"m-step{step:08d}{mark}.safetensors" for step in (3, 4) for mark in ("", "_ema")]
    assert names(tmp_path) == sorted([*kept, "m.safetensors", "m_ema.safetensors"])


@pytest.mark.parametrize("is_last", [False, True])
def test_what_a_killed_run_had_no_time_to_remove_goes_when_it_resumes(is_last: bool, tmp_path: Path):
    after_step(keep_one(tmp_path), 3)
    after_step(keep_one(tmp_path), 4)
    write_file(tmp_path / "m-step00000002")  # as if the run was killed before it removed this
    after_step(keep_one(tmp_path), 4, is_resumed=True, is_last=is_last)
    steps = ["m-step00000003", "m-step00000004"]
    assert names(tmp_path) == (["m", *steps] if is_last else steps)


def test_a_save_that_fails_removes_nothing_is_reported_and_tried_again(tmp_path: Path, caplog):
    def write(path: Path) -> None:
        if path.name == "m-step00000003":
            raise UserError("disk full.")
        write_file(path)

    checkpoints = keep_one(tmp_path, write)
    for step in (1, 2, 3):
        after_step(checkpoints, step)
    assert names(tmp_path) == ["m-step00000001", "m-step00000002"]
    assert [said for said in caplog.messages if "'m-step00000003' is not saved" in said and "disk full." in said]
    after_step(checkpoints, 4)
    assert "m-step00000004" in names(tmp_path)


def test_a_finished_model_that_cannot_be_saved_is_an_error(tmp_path: Path):
    def write(path: Path) -> None:
        raise UserError("disk full.")

    with pytest.raises(UserError, match="disk full"):
        after_step(keep_one(tmp_path, write), 3, is_last=True)


def test_a_stopped_run_leaves_its_model_and_the_state_to_go_on_from(tmp_path: Path):
    checkpoints = keep_one(tmp_path)
    checkpoints._progress.step = 7
    assert f'--resume "{tmp_path / "m-step00000007-state"}"' in checkpoints.at_stop()
    assert names(tmp_path) == ["m-step00000007", "m-step00000007-state"]


def test_an_old_model_that_another_program_holds_open_stays_and_is_named(tmp_path: Path, monkeypatch, caplog):
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "used by another process", str(self))  # what Windows answers

    checkpoints = keep_one(tmp_path)
    after_step(checkpoints, 1)
    after_step(checkpoints, 2)
    monkeypatch.setattr(Path, "unlink", refuse)
    after_step(checkpoints, 3)
    assert names(tmp_path) == ["m-step00000001", "m-step00000002", "m-step00000003"]
    assert f"'{tmp_path / 'm-step00000001'}' cannot be removed and is kept" in caplog.text


def test_an_old_model_that_someone_removed_already_is_not_missed(tmp_path: Path):
    checkpoints = keep_one(tmp_path)
    after_step(checkpoints, 1)
    after_step(checkpoints, 2)
    (tmp_path / "m-step00000001").unlink()
    after_step(checkpoints, 3)
    assert names(tmp_path) == ["m-step00000002", "m-step00000003"]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "from_diffusers", "expected"),
    [
        (None, False, "safetensors"),
        (None, True, "diffusers"),
        ("safetensors", True, "safetensors"),
        ("ckpt", True, "ckpt"),
        ("diffusers", False, "diffusers"),
        ("diffusers_safetensors", False, "diffusers"),
    ],
)
def test_the_format_is_the_one_asked_for_or_that_of_the_source(given, from_diffusers, expected):
    assert SaveOptions(save_model_as=given).format(source_is_diffusers=from_diffusers) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"output_name": "a/b"}, "--output_name is 'a/b'"),
        ({"save_every_n_steps": 0}, "--save_every_n_steps is 0; it must be 1 or more."),
        ({"save_every_n_epochs": -1}, "--save_every_n_epochs is -1; it must be 1 or more."),
        ({"save_last_n_steps": 5}, "--save_last_n_steps needs --save_every_n_steps."),
        ({"save_last_n_epochs": 5}, "--save_last_n_epochs needs --save_every_n_epochs."),
        (
            {"save_every_n_steps": 5, "save_last_n_steps_state": 5},
            "--save_last_n_steps_state needs --save_state.",
        ),
    ],
)
def test_each_mistake_is_one_sentence(fields: dict, problem: str, tmp_path: Path):
    [found] = problems_of(SaveOptions(**{"output_dir": tmp_path / "new", **fields}))
    assert found.startswith(problem)


@pytest.mark.parametrize("below", ["", "new", "new/newer"])
def test_a_file_where_the_output_folder_should_be_is_found_before_training(below: str, tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    [problem] = SaveOptions(output_dir=tmp_path / "file" / below).problems()
    assert problem == f"--output_dir: '{tmp_path / 'file'}' is a file; name a folder."


def refusing(error: OSError, refused: Path) -> Callable[[Path], None]:
    """Return a writer that fails as the system does for every file in the folder `refused`."""

    def write(path: Path) -> None:
        with replacing(path) as file:
            if path.parent == refused:
                raise error
            file.write(b"a model")

    return write


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.EFBIG])
@pytest.mark.parametrize("occasion", ["end", "stop"])
def test_what_can_never_be_written_in_its_place_is_saved_elsewhere(number, occasion, tmp_path: Path):
    folder = tmp_path / "output"
    folder.mkdir()
    checkpoints = make_checkpoints(
        SaveOptions(folder, "m"), ".safetensors", refusing(OSError(number, "refused"), folder)
    )
    checkpoints._progress.step = 3
    with pytest.raises(UserError, match=r"The model is saved as '.*saved-elsewhere-.*' instead"):
        checkpoints.at_stop() if occasion == "stop" else after_step(checkpoints, 3, is_last=True)
    [elsewhere] = folder.iterdir()
    saved = ["m-step00000003-state", "m-step00000003.safetensors"] if occasion == "stop" else ["m.safetensors"]
    assert names(elsewhere) == saved


def test_a_signal_ends_the_wait_for_space(tmp_path: Path):
    with listening_for_stop(tmp_path) as stop:
        full = refusing(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "output")
        checkpoints = make_checkpoints(SaveOptions(tmp_path / "output", "m"), ".safetensors", full, stop.waiting)
        sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        sender.start()
        with pytest.raises(SystemExit) as ended:
            after_step(checkpoints, 3, is_last=True)
        sender.join()
    assert ended.value.code == 128 + signal.SIGTERM
