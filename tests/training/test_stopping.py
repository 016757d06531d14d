"""A stop is asked for by signal or by file. What a run then does is tested in tests/reliability/test_stops.py."""

import signal
from pathlib import Path

import pytest

from library.training import stopping
from library.training.stopping import STOP_FILE, listening_for_stop


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
    assert "which an earlier run was to obey" in capsys.readouterr().out
