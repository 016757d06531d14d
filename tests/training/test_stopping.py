"""A stop is asked for by signal or by file. What a run then does is tested in tests/reliability/test_stops.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from library.training import stopping
from library.training.stopping import SAVE_FILE, STOP_FILE, listening_for_stop

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_makes_the_request_and_the_next_ends_at_once(number, status, tmp_path: Path, monkeypatch):
    before = signal.getsignal(number)
    with listening_for_stop(tmp_path) as stop:
        assert not stop.is_made()
        signal.raise_signal(number)
        assert stop.is_made()
        assert stop.exit_status == status
        signal.raise_signal(number)  # the same one, handed on by a launcher
        monkeypatch.setattr(stopping, "SAME_SIGNAL_SECONDS", 0.0)
        with pytest.raises(SystemExit) as ending:
            signal.raise_signal(number)
        assert ending.value.code == status
    assert signal.getsignal(number) is before


def test_the_file_makes_the_request_and_goes(tmp_path: Path):
    with listening_for_stop(tmp_path) as stop:
        assert not stop.is_made()
        (tmp_path / STOP_FILE).touch()
        assert stop.is_made()
        assert stop.is_made()
        assert stop.exit_status == 0
    assert not (tmp_path / STOP_FILE).exists()


def test_a_file_of_before_is_not_for_this_run(tmp_path: Path, capsys):
    (tmp_path / STOP_FILE).touch()
    with listening_for_stop(tmp_path) as stop:
        assert not stop.is_made()
    assert "which was meant for an earlier run" in capsys.readouterr().out


def test_a_stop_file_stops_the_run_that_it_names(tmp_path: Path):
    (tmp_path / "stop-a").touch()  # meant for an earlier run of this name
    with listening_for_stop(tmp_path, "a") as stop_a, listening_for_stop(tmp_path, "b") as stop_b:
        assert not stop_a.is_made()
        (tmp_path / "stop-a").touch()
        assert not stop_b.is_made()
        assert stop_a.is_made()
        assert not stop_b.is_made()
    assert list(tmp_path.iterdir()) == []


def test_a_stop_file_without_a_name_stops_every_run_and_none_that_starts_then(tmp_path: Path):
    running = {"a", "b"}
    with (
        listening_for_stop(tmp_path, "a", lambda: running != {"a"}) as stop_a,
        listening_for_stop(tmp_path, "b", lambda: running != {"b"}) as stop_b,
    ):
        (tmp_path / "stop").touch()
        assert stop_a.is_made()
        assert stop_a.is_made()
        with listening_for_stop(tmp_path, "c", lambda: True) as stop_c:
            assert not stop_c.is_made()
        running.remove("a")
        assert stop_b.is_made()
    assert list(tmp_path.iterdir()) == []


def test_a_save_file_asks_each_run_once_and_stops_none(tmp_path: Path):
    running = {"a", "b"}
    (tmp_path / "save-a").touch()  # meant for an earlier run of this name
    with (
        listening_for_stop(tmp_path, "a", lambda: running != {"a"}) as of_a,
        listening_for_stop(tmp_path, "b", lambda: running != {"b"}) as of_b,
    ):
        assert not of_a.save_now.is_made()
        (tmp_path / SAVE_FILE).touch()
        assert of_a.save_now.is_made()
        assert not of_a.save_now.is_made()
        running.remove("a")
        assert of_b.save_now.is_made()
        (tmp_path / "save-a").touch()
        assert not of_b.save_now.is_made()
        assert of_a.save_now.is_made()
        assert not of_a.is_made()
        assert not of_b.is_made()
    assert list(tmp_path.iterdir()) == []


STOPPED_BY_ITS_TERMINAL = """
import signal
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
from library.training.stopping import listening_for_stop
with listening_for_stop(Path()) as stop:
    print("listening", flush=True)
    while not stop.is_made():
        pass
    for _ in range(3):
        print("saving", flush=True)
    raise SystemExit(stop.exit_status)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no such terminals")
def test_a_terminal_that_closes_asks_for_a_stop_and_is_not_written_to_any_more(tmp_path: Path):
    leader, terminal = os.openpty()
    script = [sys.executable, "-c", STOPPED_BY_ITS_TERMINAL]
    where = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(script, stdout=terminal, stderr=terminal, cwd=tmp_path, env=where) as run:
        os.close(terminal)
        said = b""
        while not said.endswith(b"\n"):  # the terminal may pass a line on in pieces
            said += os.read(leader, 1000)
        assert said.strip() == b"listening"
        os.close(leader)  # from here on, writing to it is an error
        run.send_signal(signal.SIGHUP)
        try:
            assert run.wait(timeout=60) == 129
        finally:
            run.kill()  # leaving the block waits for it


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_nohup_keeps_its_meaning(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening_for_stop(tmp_path) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_made()
    finally:
        signal.signal(signal.SIGHUP, before)
