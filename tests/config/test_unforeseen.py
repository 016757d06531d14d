"""Errors that no script expects: one line that says what happened, the traceback in a file, status 1."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from library.config.errors import exits_on_user_error
from library.config.unforeseen import explained

CAUGHT = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in work
RuntimeError: something odd"""

KINDS = [
    (MemoryError(), "this machine is out of memory (MemoryError)", "Close other programs"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "this machine is out of",
        "",
    ),
    (OverflowError("too large"), "does not expect (OverflowError: too large)", "Please report it"),
    (RecursionError("maximum recursion depth exceeded"), "does not expect (RecursionError: ", "Please report it"),
    (ZeroDivisionError("division by zero"), "does not expect (ZeroDivisionError: ", "Please report it"),
    (RuntimeError("shape '[2]' is invalid\nmore"), "does not expect (RuntimeError: shape '[2]' is invalid).", ""),
    (RuntimeError(CAUGHT), "does not expect (RuntimeError: something odd).", "Please report it"),
    (RuntimeError("DataLoader worker (pid 4) is killed by signal: Killed."), "a worker process that reads", "workers"),
    (RuntimeError("DataLoader worker (pid(s) 4) exited unexpectedly"), "a worker process that reads images", "memory"),
    (ConnectionResetError(104, "Connection reset by peer"), "a worker process that reads images has ended", "memory"),
    (RuntimeError("DataLoader worker (pid 4) is killed by signal: Bus error."), "/dev/shm", "--shm-size=8g"),
    (RuntimeError("CUDA error: an illegal memory access"), "the GPU or its driver has failed", "nvidia-smi"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), "the GPU is out of memory", "smaller batches"),
    (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "another process of this run", ""),
    (
        RuntimeError("[../gloo/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),
        "another process of this run does not answer",
        "start all of them again",
    ),
    (OSError(24, "Too many open files"), "this process may not open more files", "ulimit -n"),
]


@pytest.mark.parametrize(("error", "problem", "remedy"), KINDS, ids=lambda value: str(value)[:30])
def test_an_error_is_one_line_with_what_happened_and_what_helps(error: Exception, problem: str, remedy: str):
    failure = explained(error)
    assert problem in failure.problem
    assert remedy in failure.remedy
    assert "\n" not in str(failure)
    assert failure.exit_status == 1
    [file] = re.findall(r"The traceback is in '(.+)'", failure.problem)
    assert type(error).__name__ in Path(file).read_text(encoding="utf-8")
    Path(file).unlink()


@pytest.mark.parametrize(("rank", "is_said"), [("0", True), ("1", True), ("2", False)])
def test_of_many_processes_that_miss_another_two_say_it(rank: str, is_said: bool, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)

    @exits_on_user_error
    def main(argv: Sequence[str] | None = None) -> int:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    assert main() == 1
    assert ("error: another process of this run has ended" in capsys.readouterr().err) == is_said


def test_a_script_ends_with_one_line_and_not_with_a_traceback(capsys):
    @exits_on_user_error
    def main(argv: Sequence[str] | None = None) -> int:
        return 1 // 0

    assert main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: something happened that this program does not expect (ZeroDivisionError: ")
    assert len(said.splitlines()) == 1
    [file] = re.findall(r"The traceback is in '(.+?)'", said)
    assert "return 1 // 0" in Path(file).read_text(encoding="utf-8")
    Path(file).unlink()
