"""A data set file as a form: its tables and keys, and what was typed into them as TOML."""

import tomllib
from collections.abc import Mapping
from typing import Any

from library.config.errors import UserError
from library.data.dataset_schema import KEYS, WITHOUT_EFFECT, lines_of_keys

_TABLES = ("general", "datasets", "subsets")


def data_set_form() -> dict[str, list[dict[str, str]]]:
    """Return the keys of each kind of table, with what they expect."""
    return {
        kind: [{"name": key, "expects": KEYS[kind][key].expected} for key in KEYS[kind] if key not in WITHOUT_EFFECT]
        for kind in _TABLES
    }


def typed_of_data_set(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what would be typed for a data set file."""
    return {
        "general": _texts(document.get("general", {})),
        "datasets": [
            {"keys": _texts(table), "subsets": [_texts(each) for each in table.get("subsets", [])]}
            for table in document.get("datasets", [])
        ],
    }


def data_set_of(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data set file, as TOML has it. Raise `UserError` for what is no form of one.

    `typed` has "general" and "datasets", each of these "keys" and "subsets", all texts by key. What a key does not take
    is left as a text, which the reader of data sets refuses with its place.
    """
    try:
        general = _values("general", typed["general"])
        datasets = [
            {**_values("datasets", table["keys"]), "subsets": [_values("subsets", each) for each in table["subsets"]]}
            for table in typed["datasets"]
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError("expected a data set: general, and datasets with their subsets.") from error
    return {**({"general": general} if general else {}), "datasets": datasets}


def text_of_data_set(document: Mapping[str, Any]) -> str:
    """Return the text of the file, each key on a line by itself."""
    import tomli_w

    parts = [tomli_w.dumps({"general": document["general"]})] if "general" in document else []
    for dataset in document["datasets"]:
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        parts.append(f"[[datasets]]\n{tomli_w.dumps(own)}")
        parts += [f"[[datasets.subsets]]\n{tomli_w.dumps(subset)}" for subset in dataset["subsets"]]
    return "\n".join(parts)


def place_of_line(text: str, line: int) -> str | None:
    """Return which field stands on a line of the file: kind, number and key of its table, with dots between."""
    places = {number: f"{kind}.{count}.{key}" for (kind, count, key), number in lines_of_keys(text).items()}
    return places.get(line)


def _texts(table: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in table.items() if key != "subsets"}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value)


def _values(kind: str, texts: Mapping[str, str]) -> dict[str, Any]:
    return {key: _value(kind, key, text) for key, text in texts.items() if text != ""}


def _value(kind: str, key: str, text: str) -> Any:
    if not isinstance(text, str):
        raise TypeError(key)
    expected = KEYS[kind].get(key)
    if expected is None or expected.is_right(text):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    whole = float(value) if type(value) is int and not expected.is_right(value) else value
    return whole if expected.is_right(whole) else value
