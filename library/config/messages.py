"""What a script tells its user: the standard `logging`, shown above the progress bar, by the main process.

The main process is the first of all machines (`RANK` 0). The others report errors alone, which may be theirs only.
"""

import logging
import os
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

PROJECT_LOGGERS = ("library", "finetune", "demo", "studio", "sdxl_train", "sdxl_gen_img", "__main__")
_LOGGERS_OF_NO_INTEREST = ("bitsandbytes", "torch.utils.cpp_extension")
"""Of libraries that warn, when they are imported, of what this project does not use: 4-bit kernels on the CPU, and
the toolkit of CUDA. Their errors are shown."""


def start_logging(level: str = "INFO", file: Path | None = None, *, simple: bool = True) -> None:
    """Send the messages of this project's modules to the console; a second call replaces the settings of the first.

    With `file` messages are appended to it, and the console shows errors only. `level` is the lowest that is reported.
    Without `simple` each line begins with time and level. Raise `OSError` if the file cannot be written.
    """
    handlers: list[logging.Handler] = [_Console()]
    if file is not None and _rank() == "0":
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[0].setLevel(logging.ERROR)
    for handler in handlers:
        handler.setFormatter(_Printable(None if simple else "%(asctime)s %(levelname)s %(message)s"))
    for name in PROJECT_LOGGERS:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level)
    for name in _LOGGERS_OF_NO_INTEREST:
        logging.getLogger(name).setLevel(logging.ERROR)


class _Console(logging.Handler):
    """Prints to stdout, from WARNING on to stderr, above the progress bar if one is shown.

    The streams are looked up for each message, so that redirecting them takes effect.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if _rank() != "0" and (record.levelno < logging.ERROR or getattr(record, "is_shared", False)):
            return
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with suppress(OSError):  # a closed terminal, a pipe that nobody reads: no reason to end a run
            if "tqdm" in sys.modules:  # else there is no bar, and no need to wait for its import
                from tqdm import tqdm

                tqdm.write(self.format(record), file=stream)
            else:
                stream.write(f"{self.format(record)}\n")
            stream.flush()


class _Printable(logging.Formatter):
    """Formats a message so that names in it cannot control the terminal or forge lines."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if _rank() == "0" else f"process {_rank()}: {text}"


def _rank() -> str:
    return os.environ.get("RANK", "0")  # set by torchrun and by accelerate launch


def printable(text: str) -> str:
    """Return `text` with its control characters escaped, except the line ends of lists in our own messages.

    A line of such a list begins with two spaces. Any other line end is escaped, so that a file name cannot forge a
    message; escape sequences and bidirectional overrides are shown as text instead of taking effect.
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
