"""Arguments of optimizers and schedules: `name=value` words of the command line to Python values."""

import ast
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from library.config.errors import UserError


def parse_arguments(flag: str, words: Sequence[str], *, texts: Collection[str] = ()) -> dict[str, Any]:
    """Return `["weight_decay=0.01", "betas=0.9,0.99"]` as keyword arguments: numbers, tuples, booleans, None, text.

    Arguments may also stand in one word, separated by spaces or commas, and a comma behind the last one is no part of
    its value. Those named in `texts` are texts, with or without quotes. Raise `UserError`, which names the `flag`, for
    a word without "=", a value that is not of this kind, and a name given twice.
    """
    arguments: dict[str, Any] = {}
    for word in (each for joined in words for each in _arguments_of(joined)):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(f"{flag}: '{word}' is not understood.", "Write name=value, without spaces.")
        if name in arguments:
            raise UserError(f"{flag}: '{name}' is set twice.", "Keep one of the two.")
        arguments[name] = value.strip("'\"") if name in texts else _value(flag, word, value)
    return arguments


def _value(flag: str, word: str, value: str) -> Any:
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        expected = "It must be a number, numbers with commas, True, False, None or a text in quotes."
        raise UserError(f"{flag}: the value of '{word}' is not understood.", expected) from None
    numbers = read if isinstance(read, tuple | list) else (read,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{flag}: '{word}' is larger than any number that can be computed with.", "Correct the value.")
    return read


def _arguments_of(word: str) -> list[str]:
    """Return the arguments of one word of the command line: "a=1, b=2" holds two; "a b=2" is left as it is."""
    separate = [each for each in _BETWEEN_ARGUMENTS.split(word.strip(_AROUND_ARGUMENTS)) if each]
    return separate if all("=" in each for each in separate) else [word]


_AROUND_ARGUMENTS = " \t,;"
_BETWEEN_ARGUMENTS = re.compile(r"[\s,;]+(?=[^\W\d]\w*\s*=)")
