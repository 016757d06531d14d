"""Signals and the stop file: what is saved, what is reported, how the process ends."""

import re
import signal
import time
from pathlib import Path

import pytest

import sdxl_train
from library.training.progress import read_progress
from library.training.run_lock import run_lock
from library.training.run_record import RECORD_FOLDER, STOPPED, find_records
from library.training.stopping import SAME_SIGNAL_SECONDS
from tests.conftest import PreparedSet, base_flags
from tests.forked_runs import FOLDER, KILL_AT, KILL_BY, REPORT_CALL
from tests.outcome import outcome_of
from tests.reliability.refusal import said_on_refusal

STEP_OF_SECONDS = (
    *("--dataset_repeats=20", "--gradient_accumulation_steps=60", "--max_train_steps=2"),
    "--max_data_loader_n_workers=0",
)
STEP_OF_MINUTES = (*STEP_OF_SECONDS, "--dataset_repeats=2000", "--gradient_accumulation_steps=6000")
BACKWARD = "library.training.learner:Learner.backward"
LOAD_MODEL = "library.training.setup:load_model"


@pytest.fixture
def argv(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path) -> list[str]:
    """A run of a few steps that saves nothing before its end."""
    return [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / "my output"),
        *("--output_name=m", "--seed=7", "--max_train_steps=50"),
    ]


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, True, 130), pytest.param(signal.SIGTERM, True, 143, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_first_signal_ends_the_run_after_the_step(number, to_group, status, argv, run_server, tmp_path: Path):
    run = run_server("train", [*argv, "--max_data_loader_n_workers=2"])
    run.wait_until_said("1/50")
    run.send(number, to_group=to_group)  # the workers that read batches get it too, as from a terminal
    assert run.wait() == status
    assert "Stopping after this step" in run.said
    assert "Traceback" not in run.said
    last = [line for line in run.said.splitlines() if line.strip()][-1]
    said = re.fullmatch(r'Training stopped after step (\d+)\. Continue with the same command and --resume "(.+)"', last)
    assert said is not None, last
    state = Path(said[2])
    assert read_progress(state).step == int(said[1]) < 50
    assert outcome_of(tmp_path / "my output").keys() == {f"state {state.name}", f"model {state.name[:-6]}"}


def test_a_second_signal_ends_it_at_once_unless_it_is_the_terminal_that_closes(argv, run_server, tmp_path: Path):
    run = run_server("train", [*argv, *STEP_OF_MINUTES], **{REPORT_CALL: BACKWARD})
    run.wait_until_called(BACKWARD)
    run.send(signal.SIGINT)
    run.wait_until_said("Press Ctrl-C again to quit")
    time.sleep(1.2 * SAME_SIGNAL_SECONDS)  # sooner it would be taken for the same Ctrl-C, handed on by a launcher
    if hasattr(signal, "SIGHUP"):
        run.send(signal.SIGHUP)  # handled before the next one, and would end the run with 129
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert [path.name for path in (tmp_path / "my output").iterdir()] == [RECORD_FOLDER]
    [record] = find_records(tmp_path / "my output")
    assert record.state == STOPPED and "without a save" in record.end.message


def test_a_second_run_of_the_same_model_is_refused_until_the_first_has_ended(argv, run_server, tmp_path: Path, capsys):
    run = run_server("train", [*argv, *STEP_OF_MINUTES])
    run.wait_until_said("0/2")
    assert "is still training 'm' into" in said_on_refusal(sdxl_train, [*argv, "--resume=latest"], capsys)
    with run_lock(tmp_path / "my output", "another model"):
        pass
    run.send(signal.SIGKILL)
    run.wait()
    with run_lock(tmp_path / "my output", "m"):  # whatever a killed run has left
        pass


def test_a_stop_while_samples_are_drawn_leaves_the_others_out(argv, run_server, tmp_path: Path):
    prompts, samples = tmp_path / "prompts.txt", tmp_path / "my output" / "sample"
    prompts.write_text("a cat --e photo --w 64 --h 64 --s 20\n" * 60, encoding="utf-8")
    run = run_server("train", [*argv, f"--sample_prompts={prompts}", "--sample_at_first"])
    run.wait_until(lambda: list(samples.glob("*.png")), "saved a sample")
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert re.search(r"step 0: the run stops, \d+ images are not drawn", run.said)
    assert len(list(samples.glob("*.png"))) < 60


def test_a_second_signal_in_the_middle_of_a_save_leaves_no_half_written_file(argv, run_server, tmp_path: Path):
    output = tmp_path / "my output"
    in_the_state = {KILL_AT: "4", KILL_BY: str(int(signal.SIGINT)), FOLDER: str(output / "m-")}  # 3 for the model
    run = run_server("train", [*argv, *STEP_OF_SECONDS], **in_the_state, **{REPORT_CALL: BACKWARD})
    run.wait_until_called(BACKWARD)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "Training stopped after" not in run.said
    assert outcome_of(output).keys() == {"model m-step00000001"}  # whole; of the state there is nothing


def test_what_comes_before_the_first_step_saves_nothing(argv, run_server, tmp_path: Path):
    run = run_server("train", argv, **{REPORT_CALL: LOAD_MODEL})
    run.wait_until_called(LOAD_MODEL)
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert not list((tmp_path / "my output").glob("*.safetensors"))
    assert "Traceback" not in run.said


def test_the_stop_file_ends_a_run_well_and_one_of_before_does_not(argv, run_server, tmp_path: Path):
    output = tmp_path / "my output"
    output.mkdir()
    (output / "stop").touch()
    run = run_server("train", [*argv, "--max_data_loader_n_workers=0"])
    run.wait_until_said("1/50")
    assert "which was meant for an earlier run" in run.said
    (output / "save").touch()
    run.wait_until(lambda: list(output.glob("m-step*-state")), "saved a state")
    [state] = output.glob("m-step*-state")
    asked_at = read_progress(state).step
    run.wait_until(lambda: any(f"{step}/50" in run.said for step in range(asked_at + 1, 51)), "gone on")
    (output / "stop").touch()
    assert run.wait() == 0
    assert not (output / "stop").exists()
    assert not (output / "save").exists()
    assert 0 < asked_at < max(read_progress(path).step for path in output.glob("*-state"))
