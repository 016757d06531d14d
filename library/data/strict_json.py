"""JSON that is read strictly: no key twice, and errors that name the place."""

import json
from typing import Any

from library.config.errors import UserError


def parse_json(text: str, file: str, remedy: str, *, line: int | None = None) -> Any:
    """Return the value of a JSON text: that of a whole file, or of its line `line` (from 1) alone.

    Raise `UserError` naming `file`, line and column for broken JSON, and naming a key that one object has twice.
    """
    where = file if line is None else f"{file}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeated_keys)
    except json.JSONDecodeError as error:
        row = error.lineno if line is None else line
        raise UserError(
            f"{file} is not valid JSON: line {row}, column {error.colno}: {error.msg}.", f"Correct the line, {remedy}."
        ) from error
    except (RecursionError, ValueError) as error:  # thousands of brackets, a number of thousands of digits
        raise UserError(f"{where} is not metadata ({error}).", f"Check the file, {remedy}.") from error
    except _RepeatedKey as error:
        raise UserError(
            f"{where}: the key {error} occurs twice in one object.", "Remove or rename one of the two."
        ) from error


def shown(value: Any) -> str:
    """Return a value as JSON, at most 60 characters of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _RepeatedKey(Exception):
    pass


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(f"'{key}'")
        result[key] = value
    return result
