"""TOML text to its tables, whatever it holds: what cannot be read is always the same kind of error."""

import tomllib
from typing import Any

_NO_INTEGER = 2**64
"""TOML promises 64 bits; Python would read thousands of digits and then refuse to print them."""


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; raises `ValueError` with the reason for whatever is no TOML."""
    try:
        document = tomllib.loads(text)
        _require_64_bits(document)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return document


def _require_64_bits(value: Any) -> None:
    if isinstance(value, dict | list):
        for element in value.values() if isinstance(value, dict) else value:
            _require_64_bits(element)
    elif isinstance(value, int) and abs(value) >= _NO_INTEGER:
        raise ValueError("it holds a whole number of more than 64 bits")
