"""How a run is asked to stop: Ctrl-C, a signal, a terminal that closes, or a file named `stop` in the output folder."""

import logging
import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

STOP_FILE = "stop"
EXIT_AFTER_SIGNAL = 128
"""A run that a signal has stopped exits with this plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM."""
SAME_SIGNAL_SECONDS = 1.0
"""Launchers hand a Ctrl-C on that the terminal has already sent: what comes so soon is not a second one."""

_HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # not on Windows


@dataclass
class StopRequest:
    """Whether the run is to end after the current step, and the exit status it then has."""

    output_dir: Path
    signal_number: int | None = None
    _file_seen: bool = field(default=False, init=False)

    def is_made(self) -> bool:
        """Look whether a stop has been asked for; the file is removed as it is obeyed."""
        file = self.output_dir / STOP_FILE
        if file.is_file():
            self._file_seen = True
            with suppress(OSError):
                file.unlink()
        return self._file_seen or self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """0 for the file, as for a finished run; a signal leaves its own."""
        return 0 if self.signal_number is None else EXIT_AFTER_SIGNAL + self.signal_number


@contextmanager
def listening_for_stop(output_dir: Path) -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM makes the request; a second one ends the process at once.

    So does SIGHUP, unless it is ignored (nohup), but it is never the second one: a terminal that closes must not end a
    run that is saving. Ending at once is an exception too, so that a file being written is taken back. A stop file
    that is there already was meant for an earlier run and is removed. Outside the main thread, where no signal arrives,
    only the file is heeded.
    """
    request = StopRequest(output_dir)
    if (output_dir / STOP_FILE).is_file():
        log.info("removed '%s', which was meant for an earlier run", output_dir / STOP_FILE)
        with suppress(OSError):
            (output_dir / STOP_FILE).unlink()
    first_time = 0.0
    process = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        if os.getpid() != process:  # a reader of batches that was forked a moment ago
            return
        if number == _HANG_UP:
            _leave_terminal()
        if request.signal_number is None:
            request.signal_number, first_time = number, time.monotonic()
            log.warning("Stopping after this step. Press Ctrl-C again to quit immediately without saving.")
        elif number != _HANG_UP and time.monotonic() - first_time > SAME_SIGNAL_SECONDS:
            raise SystemExit(EXIT_AFTER_SIGNAL + number)

    before = {}
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
            if number is not None and not _is_nohup(number):
                before[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_nohup(number: int) -> bool:
    return number == _HANG_UP and signal.getsignal(number) == signal.SIG_IGN


def _leave_terminal() -> None:
    """Let what is printed from now on vanish, unless it goes to a file: writing to a closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)
