"""Names and texts that go into files: whether every system can hold them, tried before hours of work rest on it."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from library.config.errors import UserError
from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX, temporary_path

TIME_FORMAT = "%Y%m%d%H%M%S"
"""How the time of a run's start stands in the names of its files."""
_DEVICES = frozenset({"con", "prn", "aux", "nul", "conin$", "conout$"}) | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"
}
_TRIAL = "names"
_SEPARATORS = re.compile(r"[/\\]")
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_HALVES = re.compile("[\ud800-\udfff]")


def text_problem(text: str) -> str | None:
    """Return why `text` cannot be written into a file as UTF-8 that all programs read; None if it can."""
    if "\0" in text:
        return f"character {text.index(chr(0)) + 1} is NUL"
    if half := _HALVES.search(text):
        return f"character {half.start() + 1} is no UTF-8"
    return None


def writable_text(text: str) -> str:
    """Return `text` with each half of a surrogate pair written as `\\udc80`, since UTF-8 cannot hold it."""
    return json_bytes(text).decode("utf-8")


def json_bytes(text: str) -> bytes:
    """Return a JSON text as UTF-8, each half of a surrogate pair as `\\udc80`: in a string the same character again."""
    return text.encode("utf-8", errors="backslashreplace")


def name_problem(name: str) -> str | None:
    """Return why `name` cannot be the name of a file on Linux, macOS and Windows alike; None if it can."""
    if not name.strip():
        return "it is empty"
    if name in (".", ".."):
        return "it means a folder"
    if separator := _SEPARATORS.search(name):
        return f"'{separator[0]}' separates folders"
    if control := _CONTROLS.search(name):
        return f"character {control.start() + 1} is a control character"
    if half := _HALVES.search(name):
        return f"character {half.start() + 1} is no UTF-8"
    if sign := _NOT_ON_WINDOWS.search(name):
        return f"Windows allows no {sign[0]} in a name"
    if name[-1] in ". ":
        return "Windows allows no dot or space at the end of a name"
    if name.partition(".")[0].rstrip().lower() in _DEVICES:
        return f"Windows takes {name.partition('.')[0].rstrip()} for a device"
    return None


def require_writable_name(folder: Path, name: str, what: str, suffixes: Iterable[str] = ("",)) -> None:
    """Raise `UserError` unless files named `name` with each of `suffixes` can be written in `folder`.

    Tries them, in a temporary folder beside where `folder` is or will be, under the longest name that they have while
    they are written. `what` says where the name comes from, such as "--output_name".
    """
    if problem := name_problem(name):
        raise UserError(f"{what} is '{name}': {problem}.", "Choose another name.")
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.is_dir())
    try:
        with _trial_folder(existing) as made:
            inside = made / absolute.relative_to(existing)  # folders that are to be made have names as well
            inside.mkdir(parents=True, exist_ok=True)
            for suffix in suffixes:
                trial = inside / f"{name}{suffix}"
                trial.write_bytes(os.urandom(1))
                trial.rename(temporary_path(trial, REPLACED_SUFFIX))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{what} is '{name}': such files cannot be written in '{existing}' ({reason}).",
            "Choose another name, or another folder.",
        ) from error


@contextmanager
def _trial_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder that is removed at the end, or by the next start if this process is killed before."""
    made = temporary_path(parent / _TRIAL, PARTIAL_SUFFIX)
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
