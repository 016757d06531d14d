"""How a run is asked to stop: Ctrl-C, a signal, a terminal that closes, or a file in the output folder.

A file there asks it to save, too.
"""

import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from library.training.request_files import RequestFile

log = logging.getLogger(__name__)

STOP_FILE = "stop"
"""Stops every run of its folder; with a dash and the name of a run behind it only that one."""
SAVE_FILE = "save"
"""Asks for a model and a state in the same way; the runs go on."""
EXIT_AFTER_SIGNAL = 128
"""The exit status after a signal is this plus the number of the signal: 130 after Ctrl-C, 143 after SIGTERM."""
SAME_SIGNAL_SECONDS = 1.0
"""Launchers forward a Ctrl-C that the terminal has sent to the process too: so soon it is not a second one."""

_HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # not on Windows


@dataclass
class StopRequest:
    """Whether the run is to end after the current step, and with which exit status.

    `has_company()` says whether other runs train into the same folder: they have to see its stop file, too. `save_now`
    is the file by which the run is asked to save and go on.
    """

    output_dir: Path
    output_name: str | None = None
    has_company: Callable[[], bool] = bool
    signal_number: int | None = None
    is_waiting: bool = False
    save_now: RequestFile = field(init=False)
    _stop: RequestFile = field(init=False)
    _file_seen: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        where = self.output_dir, self.output_name
        self._stop = RequestFile(*where, STOP_FILE, self.has_company)
        self.save_now = RequestFile(*where, SAVE_FILE, self.has_company)

    def is_made(self) -> bool:
        """Return whether a stop was requested; remove the stop file once every run has seen it."""
        self._file_seen = self._stop.is_made() or self._file_seen
        return self._file_seen or self.signal_number is not None

    def discard_earlier(self) -> None:
        """Remove the files that were meant for an earlier run; one that other runs have to see is not counted."""
        self._stop.discard_earlier()
        self.save_now.discard_earlier()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block, which may wait without end, the next signal ends the process."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False

    @property
    def exit_status(self) -> int:
        """The exit status of the run: 0 after a stop file, as if finished; otherwise that of the signal."""
        return 0 if self.signal_number is None else EXIT_AFTER_SIGNAL + self.signal_number


@contextmanager
def listening_for_stop(
    output_dir: Path, output_name: str | None = None, has_company: Callable[[], bool] = bool
) -> Iterator[StopRequest]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP requests a stop; a second one ends the process at once.

    SIGHUP is ignored under nohup, and never counts as the second one: a terminal that closes must not end a run that
    is saving. The process ends by an exception, so that a half-written file is removed. A stop file that exists
    already was meant for an earlier run and is removed. Outside the main thread, which receives no signals, only the
    file works.
    """
    request = StopRequest(output_dir, output_name, has_company)
    request.discard_earlier()
    first_time = 0.0
    process = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        if os.getpid() != process:  # a data-loader worker forked a moment ago
            return
        if number == _HANG_UP:
            _leave_terminal()
        if request.signal_number is None and request.is_waiting and number != _HANG_UP:
            raise SystemExit(EXIT_AFTER_SIGNAL + number)
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
    """Discard further output, unless it goes to a file: writing to a closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)
