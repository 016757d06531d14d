"""What a script tells its user: the standard `logging`, shown above the progress bar, on the main process only."""

import logging
import os
import sys
import unicodedata
from pathlib import Path

from tqdm import tqdm

PROJECT_LOGGERS = ("library", "finetune", "demo", "sdxl_train")


class _Console(logging.Handler):
    """Prints to stdout, from WARNING on to stderr, above the progress bar if one is shown.

    The streams are looked up for each message: whoever redirects them is obeyed.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") != "0":  # torchrun's and accelerate's number of the process
            return
        tqdm.write(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


class _Printable(logging.Formatter):
    """Formats a message so that names in it cannot control the terminal or forge lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def start_logging(level: str = "INFO", file: Path | None = None, *, simple: bool = True) -> None:
    """Send the messages of this project's modules to the console, or to `file`; a second call changes the first.

    `level` is the lowest that is shown. Without `simple` each line begins with time and level.
    """
    handler: logging.Handler = _Console() if file is None else logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(_Printable(None if simple else "%(asctime)s %(levelname)s %(message)s"))
    for name in PROJECT_LOGGERS:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)


def printable(text: str) -> str:
    """Return `text` with its control characters escaped, lists in our own messages excepted.

    Those are lines that begin with two spaces. Anything else that follows a line end is escaped with it, so that a file
    name cannot forge a message; escape sequences and bidirectional overrides are shown instead of obeyed.
    """
    first, *lines = text.split("\n")
    shown = [_escaped(first)]
    for line in lines:
        if line.startswith("  "):
            shown.append(f"\n{_escaped(line)}")
        else:
            shown.append(f"\\n{_escaped(line)}")
    return "".join(shown)


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _CONTROLS else character
        for character in line
    )


_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, surrogates, and separators of lines and paragraphs."""
