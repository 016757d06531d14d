"""What a run has printed, from the end of its log: lines, and how far its progress bar is."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

_LONGEST = 256 << 10  # bytes that are read
_BAR = re.compile(r"\b(\d+)/(\d+) \[")


class LogEnd(NamedTuple):
    """The last lines of a log, with the bar as it was last shown; `size` is that of the file in bytes."""

    lines: list[str]
    size: int
    is_whole: bool


def read_log_end(path: Path, num_lines: int) -> LogEnd:
    """Return the last lines of a log. Raise `OSError` if it cannot be read."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LONGEST))
        text = file.read().decode("utf-8", "replace")
    lines = [_shown(line) for line in text.replace("\r\n", "\n").split("\n")]
    if size > _LONGEST:
        lines = lines[1:]
    while lines and not lines[-1]:
        lines.pop()
    return LogEnd(lines[-num_lines:], size, is_whole=size <= _LONGEST and len(lines) <= num_lines)


def last_bar(lines: list[str]) -> tuple[int, int] | None:
    """Return the step and the number of steps that the last progress bar shows, None without one."""
    for line in reversed(lines):
        if line.startswith("steps") and (match := _BAR.search(line)):
            return int(match[1]), int(match[2])
    return None


def last_words(lines: list[str]) -> str:
    """Return the last error with the lines that belong to it, else the last line that is no progress bar."""
    said = [line for line in lines if line.strip() and not _BAR.search(line)]
    errors = [place for place, line in enumerate(said) if line.startswith("error:")]
    if not errors:
        return (said or [""])[-1]
    behind = itertools.takewhile(lambda line: line.startswith("  "), said[errors[-1] + 1 :])
    return "\n".join([said[errors[-1]], *behind])


def _shown(line: str) -> str:
    """Return what a terminal shows of a line that was written over itself."""
    written = [part for part in line.split("\r") if part.strip()]
    return written[-1].rstrip() if written else ""
