"""JSON that is read strictly: UTF-8, no key twice, and errors that name the place; and written a piece at a time."""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from library.config.errors import UserError
from library.config.file_names import json_bytes

BYTE_ORDER_MARK = "\ufeff"


def parse_json(text: str, file: str, remedy: str, *, line: int | None = None) -> Any:
    """Return the value of a JSON text: that of a whole file, or of its line `line` (from 1) alone.

    Raise `UserError` naming `file`, line and column for broken JSON, and naming a key that one object has twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeated_keys)
    except (ValueError, RecursionError, _RepeatedKey) as error:
        raise _refusal(error, file, remedy, line) from error


def stream_json(path: Path, remedy: str, *, if_missing: str) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the object that a file holds, without holding the file in memory.

    A name that comes twice is yielded twice. Raise as `parse_json`, and for a file that cannot be read, is not UTF-8
    or holds anything else than an object.
    """
    where = f"'{path}'"
    try:
        with path.open("rb") as file:
            yield from _Stream(file, where).pairs()
    except OSError as error:
        remedy_of_path = if_missing if isinstance(error, FileNotFoundError) else "Check the path."
        raise UserError(f"cannot read {where}: {error.strerror or error}.", remedy_of_path) from error
    except _NotUtf8 as error:
        raise UserError(f"{where} is not UTF-8: {error}.", "Save it as UTF-8.") from error
    except (ValueError, RecursionError, _RepeatedKey) as error:
        raise _refusal(error, where, remedy) from error


def _refusal(error: Exception, file: str, remedy: str, line: int | None = None) -> UserError:
    """Return what to tell the user of an error of parsing a file, or its line `line` alone."""
    if isinstance(error, json.JSONDecodeError):
        row = error.lineno if line is None else line
        return UserError(
            f"{file} is not valid JSON: line {row}, column {error.colno}: {error.msg}.", f"Correct the line, {remedy}."
        )
    where = file if line is None else f"{file}, line {line}"
    if isinstance(error, _RepeatedKey):
        return UserError(f"{where}: the key {error} occurs twice in one object.", "Remove or rename one of the two.")
    # Thousands of brackets, a number of thousands of digits.
    return UserError(f"{where} is not metadata ({error}).", f"Check the file, {remedy}.")


_PIECE = 1 << 20
_FAR = 1 << 24
"""Characters: no value of metadata is so long that an error so far before the end of what was read is due to that."""
_SCAN_TEXT: Callable[[str, int], tuple[str, int]] = vars(json.decoder)["scanstring"]  # which the stubs do not know
_SPACE = re.compile(r"[ \t\n\r]*").match


class _Stream:
    """The pairs of an object in a file, of which a piece is in memory."""

    def __init__(self, file: BinaryIO, where: str):
        self._file = file
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0  # read
        self._text, self._at, self._is_over = "", 0, False
        self._lines, self._columns = 0, 0  # before the text
        decoder: Any = json.JSONDecoder(object_pairs_hook=_object_without_repeated_keys)
        self._scan = decoder.scan_once

    def pairs(self) -> Iterator[tuple[str, Any]]:
        self._more()
        self._text = self._text.removeprefix(BYTE_ORDER_MARK)
        if self._next() != "{":
            value, self._at = self._parsed(self._scan, self._at)
            if self._next():
                raise self._error("Extra data", self._at)
            raise UserError(
                f"{self._where}: expected an object of image keys, got {shown(value)}.", "Pass a metadata file."
            )
        self._at += 1
        if self._next() == "}":
            self._at += 1
        else:
            yield self._pair()
            while self._next() == ",":
                self._at += 1
                yield self._pair()
            self._expect("}", "Expecting ',' delimiter")
        if self._next():
            raise self._error("Extra data", self._at)

    def _pair(self) -> tuple[str, Any]:
        self._expect('"', "Expecting property name enclosed in double quotes")
        name, self._at = self._parsed(_SCAN_TEXT, self._at)
        self._expect(":", "Expecting ':' delimiter")
        self._next()
        value, self._at = self._parsed(self._scan, self._at)
        return name, value

    def _expect(self, character: str, message: str) -> None:
        if self._next() != character:
            raise self._error(message, self._at)
        self._at += 1

    def _next(self) -> str:
        """Skip blanks; return the character that follows, "" at the end of the file."""
        while True:
            match = _SPACE(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_over:
                return ""
            self._more()

    def _parsed(self, parse: Callable[[str, int], tuple[Any, int]], at: int) -> tuple[Any, int]:
        """Return a value and where it ends, of as much of the file as it needs."""
        while True:
            try:
                value, end = parse(self._text, self._at)
                if end < len(self._text) or self._is_over:
                    return value, end
            except StopIteration as error:
                if self._is_over or len(self._text) - error.value > _FAR:
                    raise self._error("Expecting value", error.value) from None
            except json.JSONDecodeError as error:
                if self._is_over or len(self._text) - error.pos > _FAR:
                    raise self._error(error.msg, error.pos) from None
            self._more()

    def _more(self) -> None:
        """Read on: as much as is there, and at least a piece, and forget what has been parsed."""
        parsed, rest = self._text[: self._at], self._text[self._at :]
        self._lines, self._columns = self._place(parsed, len(parsed))
        data = self._file.read(max(_PIECE, len(rest)))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = self._num_bytes - (len(error.object) - len(data)) + error.start
            raise _NotUtf8(f"byte {place} is 0x{error.object[error.start]:02x}") from error
        self._num_bytes += len(data)
        self._text, self._at, self._is_over = rest + more, 0, not data

    def _place(self, text: str, at: int) -> tuple[int, int]:
        lines = text.count("\n", 0, at)
        return self._lines + lines, at - text.rfind("\n", 0, at) - 1 if lines else self._columns + at

    def _error(self, message: str, at: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, "", 0)
        lines, columns = self._place(self._text, at)
        error.lineno, error.colno = lines + 1, columns + 1
        return error


def read_utf8(path: Path, if_missing: str = "Check the path.") -> str:
    """Return the text of a file without a byte-order mark, line ends as "\\n"."""
    try:
        return decoded_utf8(path.read_bytes(), path)
    except OSError as error:
        remedy = if_missing if isinstance(error, FileNotFoundError) else "Check the path."
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", remedy) from error


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
        yield json_bytes(f"{start}  {_quoted(name)}: {_object(values)}")
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


def shown(value: Any) -> str:
    """Return a value as JSON, at most 60 characters of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _RepeatedKey(Exception):
    pass


class _NotUtf8(Exception):
    pass


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    result.clear()
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(f"'{key}'")
        result[key] = value
    return result
