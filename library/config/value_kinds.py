"""The kinds of values that an option may have: what each is called, and how it is read from a text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORDS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
_EXACT_IN_FLOAT = 2**53
# In bytes: of a file or folder, and of folders and file together. Asking the system about a longer one is an error.
_LONGEST_NAME = 255
_LONGEST_PATH = 4095


def _truth(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError(text)
    return _WORDS[text.lower()]


def _text(text: str) -> str:
    if "\0" in text:  # no name of a file and few programs can hold it
        raise ValueError(text)
    return text


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 6.0, as forms write whole numbers, and 1e4
        if not number.is_integer() or abs(number) > _EXACT_IN_FLOAT:
            raise
        return int(number)


def _path(text: str) -> Path:
    # Path("") is the current folder, which an empty shell variable was never meant to be.
    if not text or "\0" in text or len(os.fsencode(Path(text).absolute())) > _LONGEST_PATH:
        raise ValueError(text)
    if max(len(os.fsencode(part)) for part in text.split("/")) > _LONGEST_NAME:
        raise ValueError(text)
    return Path(text)


class NumSteps(float):
    """A number of steps, or a fraction of all steps: a number below 1, or any number with a percent sign."""

    is_fraction: bool

    def __new__(cls, value: float, *, is_fraction: bool | None = None) -> "NumSteps":
        """Return `value`; below 1 it is a fraction, unless `is_fraction` says otherwise."""
        made = super().__new__(cls, value)
        made.is_fraction = value < 1 if is_fraction is None else is_fraction
        return made

    def __str__(self) -> str:
        """The text that reads as the same value: "100%" for all steps, where "1" is one step."""
        return f"{100 * float(self):.12g}%" if self.is_fraction and self >= 1 else float.__repr__(self)

    def of(self, num_steps: int) -> int:
        """Return the number of steps, rounded down, in a run of `num_steps`."""
        return int(self * num_steps) if self.is_fraction else int(self)


def _num_steps(text: str) -> NumSteps:
    if text.endswith("%"):
        return NumSteps(float(text[:-1]) / 100, is_fraction=True)
    return NumSteps(float(text))


# For each type of value: what to call it in messages, and how to read it.
KINDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    str: ("text", _text),
    int: ("a whole number", _whole_number),
    float: ("a number", float),
    NumSteps: ("a number of steps, a fraction below 1 or a percentage", _num_steps),
    bool: ("true or false", _truth),
    Path: ("a path", _path),
}
