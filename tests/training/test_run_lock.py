"""One run at a time: who holds the lock, and that nobody but a living run does."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.training.run_lock import other_runs, run_lock

ROOT = Path(__file__).parents[2]
HOLD_WITH_FORKED_CHILD = """
import os, sys, time
from pathlib import Path
from library.training.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "m"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # it is scheduled, and has let go of what it inherited
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_of_two_runs_of_one_model_the_second_is_told_of_the_first(tmp_path: Path):
    with run_lock(tmp_path, "m"):
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} is still training 'm' into"),
            run_lock(tmp_path, "m"),
        ):
            pass
        with run_lock(tmp_path, "another"):
            pass
    with run_lock(tmp_path, "m"):
        pass


def test_a_run_knows_of_others_into_its_folder_while_they_run(tmp_path: Path):
    with run_lock(tmp_path, "m"):
        assert not other_runs(tmp_path, "m")
        assert other_runs(tmp_path, "another")
        assert other_runs(tmp_path, None)
        assert not other_runs(tmp_path / "elsewhere", "another")
    assert not other_runs(tmp_path, "another")


def test_workers_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_WITH_FORKED_CHILD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} is"), run_lock(tmp_path, "m"):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is there
        with run_lock(tmp_path, "m"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def _take_turns(folder: Path, num_turns: int) -> None:
    """Hold the lock again and again; a file that is there already was made by another holder."""
    held = folder / "held"
    taken = 0
    while taken < num_turns:
        try:
            with run_lock(folder, "m"):
                held.touch(exist_ok=False)
                time.sleep(0.0005)
                held.unlink()
                taken += 1
        except UserError:
            time.sleep(0.0002)


def test_the_lock_is_never_held_twice(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    takers = [context.Process(target=_take_turns, args=(tmp_path, 150)) for _ in range(3)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
    assert [taker.exitcode for taker in takers] == [0, 0, 0]
