"""Options in a TOML file: keys are flag names, sections are only headings."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.atomic_files import write_text
from library.config.errors import UserError, error_of_problems, nearest
from library.config.spellings import Spellings

if TYPE_CHECKING:
    from library.config.options import Option

NONE_TEXT = "None"
SUFFIX = ".toml"
# The types that a TOML value may have, by the type of the option.
_TOML_TYPES: dict[type, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (float, int),
    bool: (bool,),
    Path: (str,),
}
_NO_INTEGER = 2**64
"""TOML promises 64 bits; Python reads thousands of digits and then refuses to print them."""


def config_file_path(path: Path) -> Path:
    """Return `path` with the `.toml` that users of kohya's trainer leave off."""
    return path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)


def read_config_file(path: Path, options: Sequence["Option"], spellings: Spellings) -> dict[str, Any]:
    """Return the values of a TOML file by option name.

    A replaced switch that is false, and a refused flag that is switched off (false, 0, empty), ask for nothing and
    are skipped: a file that kohya's `--output_config` wrote lists dozens of them. Raise one `UserError` that names
    every key that cannot be used.
    """
    flags = [option for option in options if not option.is_positional]
    known = {name.lstrip("-"): option for option in flags for name in (option.flag, *option.aliases)}
    values: dict[str, Any] = {}
    problems = []
    for key, value in _entries(_read_toml(path), path):
        try:
            _take(key, value, known, spellings, values)
        except UserError as error:
            problems.append(f"in '{path}': {error}")
    if problems:
        raise error_of_problems(problems)
    return values


def write_config_file(path: Path, instances: Sequence[Any], options: Sequence["Option"]) -> None:
    """Write the values of option-class instances, a section for each; reading the file returns the same values.

    `options` are those that the classes declare. Raise `UserError` if the file exists already.
    """
    import tomli_w  # only now: few commands write

    if path.exists():
        raise UserError(
            f"'{path}' exists already and is not overwritten.", "Name another --config_file, or remove the file first."
        )
    flags = {option.name: option for option in options if not option.is_positional}
    sections: dict[str, dict[str, Any]] = {}
    for instance in instances:
        section = sections.setdefault(instance._argument_group_name, {})
        for name, value in vars(instance).items():
            # Leaving a key out brings the default back, so that None is written only where the default is another.
            if name in flags and (value is not None or flags[name].default is not None):
                section[name] = _toml_value(value)
    write_text(path, tomli_w.dumps({name: values for name, values in sections.items() if values}))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # utf-8-sig: Windows' Notepad puts a byte-order mark in front.
        return parse_toml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check --config_file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text.", "Save it again with the encoding UTF-8.") from error
    except ValueError as error:
        raise UserError(
            f"'{path}' is not valid TOML: {error}.",
            r"Write text in quotes, and Windows paths in single quotes: 'C:\my set\images'.",
        ) from error


def _entries(document: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the file, those of its sections included."""
    for key, value in document.items():
        if not isinstance(value, dict):
            yield key, value
            continue
        for inner_key, inner_value in value.items():
            if isinstance(inner_value, dict):
                raise UserError(
                    f"in '{path}': the section '{key}' holds another section '{inner_key}'.",
                    "Options stand at the top or in sections one level deep.",
                )
            yield inner_key, inner_value


def _take(key: str, value: Any, known: Mapping[str, "Option"], spellings: Spellings, values: dict[str, Any]) -> None:
    """Put the value of one key into `values`, under the option's name."""
    flag = f"--{key.replace('-', '_')}"
    if flag in spellings.refused:
        if value:
            raise UserError(f"{key}: {spellings.refused[flag]}")
        return
    if flag in spellings.replaced and value is False:
        return
    flag, implied = spellings.current(flag)
    option = known.get(flag.lstrip("-"))
    if option is None:
        raise UserError(f"unknown key '{key}'.", nearest(key, known))
    new = _from_toml(option, value) if implied is None else option.from_text(implied)
    if option.is_switch:
        # kohya's files hold "sdpa = false" beside "xformers = true", which means sdpa here: what is on stays on.
        new = new or values.get(option.name, False)
    elif option.name in values and values[option.name] != new:
        raise UserError(f"'{key}' says {new!r} where another key says {option.name} = {values[option.name]!r}.")
    values[option.name] = new


def _from_toml(option: "Option", value: Any) -> Any:
    if option.is_optional and value == NONE_TEXT:
        return None
    if not option.is_list:
        return _element_from_toml(option, value)
    if not isinstance(value, list):
        raise UserError(f"{option.name} expects a list in square brackets, not {value!r}.")
    return [_element_from_toml(option, element) for element in value]


def _element_from_toml(option: "Option", value: Any) -> Any:
    # An exact match: True is an int for isinstance.
    if type(value) not in _TOML_TYPES[option.value_type]:
        raise option.refusal(value)
    return option.from_text(value) if option.value_type is Path else option.among_choices(option.value_type(value))


def _toml_value(value: Any) -> Any:
    if value is None:  # which TOML does not have
        return NONE_TEXT
    if isinstance(value, list):
        return [_toml_value(element) for element in value]
    return str(value) if isinstance(value, Path) else value


# -- TOML text --------------------------------------------------------------------------------------------------------


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raise `ValueError` with the reason for whatever is not TOML."""
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
