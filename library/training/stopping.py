"""How a run is asked to stop: Ctrl-C, a termination signal, or a file named `stop` in the output folder."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tqdm import tqdm

STOP_FILE = "stop"
EXIT_AFTER_SIGNAL = 128
"""A run that a signal has stopped exits with this plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM."""


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
            file.unlink(missing_ok=True)
            self._file_seen = True
        return self._file_seen or self.signal_number is not None

    @property
    def exit_status(self) -> int:
        """0 for the file, as for a finished run; a signal leaves its own."""
        return 0 if self.signal_number is None else EXIT_AFTER_SIGNAL + self.signal_number


@contextmanager
def listening_for_stop(output_dir: Path) -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM makes the request; a second one ends the process at once.

    Ending at once is an exception too, so that a file being written is taken back. Outside the main thread, where no
    signal arrives, only the file is heeded.
    """
    request = StopRequest(output_dir)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            raise SystemExit(EXIT_AFTER_SIGNAL + number)
        request.signal_number = number
        tqdm.write("stopping after this step; once more to stop at once, without saving")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
    except ValueError:  # not the main thread
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
