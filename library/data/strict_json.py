"""JSON that is read strictly: UTF-8, no key twice, and errors that name the place; and written a piece at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.config.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


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


def decoded_utf8(content: bytes, path: Path | str) -> str:
    """Return the text of the file `path` without a byte-order mark, line ends as "\\n"."""
    text = exact_utf8(content, f"'{path}'").removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def exact_utf8(content: bytes, where: str, *, line: int | None = None) -> str:
    """Return the text of a file, or of its line `line` (from 1), with byte-order mark and line ends.

    Raise `UserError`, naming the file `where` and the byte, for what is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}" if line is None else f"byte {error.start} of line {line}"
        raise UserError(
            f"{where} is not UTF-8: {place} is 0x{content[error.start]:02x}.", "Save it as UTF-8."
        ) from error


def pieces_of_json(content: Mapping[str, Mapping[str, Any]]) -> Iterator[bytes]:
    """Yield objects by name as `json.dumps` with indent 2 writes them, which takes four times as long.

    Non-ASCII characters are unescaped, except lone surrogates, which UTF-8 cannot encode.
    """
    start = "{\n"
    for name, values in content.items():
        yield _encoded(f"{start}  {_quoted(name)}: {_object(values)}")
        start = ",\n"
    yield b"\n}\n" if content else b"{}\n"


_quoted = json.encoder.encode_basestring


def _object(values: Mapping[str, Any]) -> str:
    lines = [f"    {_quoted(name)}: {_value(value)}" for name, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"


def _value(value: Any) -> str:
    if type(value) is str:
        return _quoted(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text.replace("\n", "\n    ")  # no text of JSON has line ends but those of its layout


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text).encode()


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
