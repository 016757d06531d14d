"""A short form of benchmarks/fuzz_options.py: two absurd options at a time are understood, or refused in one line."""

import os
import signal
import threading
from pathlib import Path

import pytest

from benchmarks.fuzz_options import Case, Script, fuzz, scripts
from benchmarks.fuzz_outcomes import outcome_in_process, outcome_of


def test_pairs_of_absurd_options_end_with_success_or_one_line_of_error(tmp_path: Path):
    result = fuzz(tmp_path / "set", seed=3, num_cases=400, with_runs=False)
    assert result["num_commands"] == 400
    assert result["findings"] == []


def test_each_script_is_fuzzed_with_all_of_its_flags():
    names = {script.name: set(script.flags) for script in scripts()}
    assert {"--learning_rate", "--xformers", "--loss_type", "--network_dim"} <= names["sdxl_train.py"]
    assert "--max_resolution" in names["prepare_buckets_latents.py"]
    assert "--recursive" in names["merge G"] & names["merge L"]


def _fails(argv: object) -> int:
    raise ValueError("a traceback")


def _says_two_things(argv: object) -> int:
    import sys

    sys.stderr.write("error: one\nerror: two\n")
    return 2


@pytest.mark.parametrize(
    ("main", "outcome"),
    [(_fails, "exception"), (_says_two_things, "message"), (lambda argv: 1, "message"), (lambda argv: 0, "success")],
)
def test_anything_else_is_a_finding(main, outcome: str):
    assert outcome_of(main, []).name == outcome


def _is_killed(argv: object) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _never_ends(argv: object) -> int:
    threading.Event().wait()
    return 0


@pytest.mark.parametrize(
    ("main", "seconds", "outcome"),
    [(_is_killed, 60, "killed"), (_never_ends, 0.2, "endless"), (lambda argv: 0, 60, "success")],
)
def test_a_process_that_is_lost_or_does_not_end_is_a_finding(main, seconds: float, outcome: str):
    assert outcome_in_process(main, [], seconds=seconds).name == outcome


def test_a_command_that_could_write_elsewhere_is_not_run():
    trainer: Script = scripts()[0]
    assert Case(trainer, ["--output_name=a"]).can_be_run
    assert not Case(trainer, ["--output_dir=../.."]).can_be_run
    assert not Case(trainer, ["--torch_compile"]).can_be_run
    assert not Case(scripts()[1], ["--batch_size=1"]).can_be_run
