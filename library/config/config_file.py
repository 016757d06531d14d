"""Options in a TOML file: keys are flag names, sections are only headings. JSON is what kohya's GUI saves."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.atomic_files import write_text
from library.config.errors import UserError, error_of_problems
from library.config.kohya_gui import flags_of_gui
from library.config.spellings import Refusals, Refused, Spellings, is_one_of
from library.config.value_kinds import NumSteps

if TYPE_CHECKING:
    from library.config.options import Option

NONE_TEXT = "None"
SUFFIX = ".toml"
GUI_SUFFIX = ".json"
_NO_INTEGER = 2**64
"""TOML promises 64 bits; Python reads thousands of digits and then refuses to print them."""


def config_file_path(path: Path) -> Path:
    """Return `path` with the `.toml` that users of kohya's trainer leave off."""
    return path if path.name.endswith((SUFFIX, GUI_SUFFIX)) else path.with_name(path.name + SUFFIX)


def read_config_file(path: Path, options: Sequence["Option"], spellings: Spellings) -> dict[str, Any]:
    """Return the values of a file by option name.

    Keys that ask for nothing are skipped: a file that kohya's `--output_config` or a settings window wrote lists
    dozens of them. Raise one `UserError` that names every key that cannot be used.
    """
    flags = [option for option in options if not option.is_positional]
    known = {name: option for option in flags for name in (option.flag, *option.aliases)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    refused = Refusals()
    for key, value in _entries(path):
        try:
            _take(key, value, known, spellings, values)
        except Refused as refusal:
            refused.add(refusal)
        except UserError as error:
            problems.append(str(error))
    if problems or refused:
        raise error_of_problems([f"in '{path}': {each}" for each in (*refused.problems(), *problems)])
    return values


def write_config_file(path: Path, instances: Sequence[Any], options: Sequence["Option"]) -> None:
    """Write the values of option-class instances, a section for each; reading the file returns the same values.

    Secrets are left out. `options` are those that the classes declare. Raise `UserError` if the file exists already.
    """
    import tomli_w  # only now: few commands write

    if path.suffix == GUI_SUFFIX:
        raise UserError(f"--output_config writes TOML, and '{path}' is a name of JSON.", f"Name it .{SUFFIX[1:]}.")
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
            if name in flags and not flags[name].is_secret and (value is not None or flags[name].default is not None):
                section[name] = toml_value(value)
    write_text(path, tomli_w.dumps({name: values for name, values in sections.items() if values}))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of the file as flags without dashes, those of its sections included."""
    text = _read_text(path)
    if path.suffix == GUI_SUFFIX:
        yield from flags_of_gui(_read_json(text, path)).items()
        return
    for key, value in _read_toml(text, path).items():
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


def _read_text(path: Path) -> str:
    try:
        # utf-8-sig: Windows' Notepad puts a byte-order mark in front.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", "Check --config_file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text.", "Save it again with the encoding UTF-8.") from error


def _read_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(
            f"'{path}' is not valid TOML: {error}.",
            r"Write text in quotes, and Windows paths in single quotes: 'C:\my set\images'.",
        ) from error


def _read_json(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}' is not valid JSON: {error}.", "Save it again, or write the options as TOML."
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"'{path}' is not a JSON object of settings.", 'It must look like {"learning_rate": 1e-5}.')
    return document


def _take(key: str, value: Any, known: Mapping[str, "Option"], spellings: Spellings, values: dict[str, Any]) -> None:
    """Put the value of one key into `values`, under the option's name, unless it asks for nothing."""
    old_flag = f"--{key.replace('-', '_')}"
    if value is None or key in spellings.file_only:
        return
    is_old = old_flag in spellings.refused or old_flag in spellings.replaced
    if is_old and spellings.asks_for_nothing(old_flag, value):
        return
    if old_flag in spellings.refused:
        raise Refused(key, spellings.refused[old_flag])
    flag, implied = spellings.current(old_flag)
    option = known.get(flag)
    if option is None:
        raise UserError(f"unknown key '{key}'.", spellings.advice(old_flag, known).replace("mean --", "mean "))
    if _is_left_alone(option, value):
        return
    new = _from_file(option, value) if implied is None else option.from_text(implied)
    if option.is_switch:
        # kohya's files hold "sdpa = false" beside "xformers = true", which means sdpa here: what is on stays on.
        new = new or values.get(option.name, False)
    elif option.name in values and values[option.name] != new:
        raise UserError(f"'{key}' says {new!r} where another key says {option.name} = {values[option.name]!r}.")
    values[option.name] = new


def _is_left_alone(option: "Option", value: Any) -> bool:
    """Return whether the value is that of a field that nobody filled in."""
    is_empty = value == "" and (option.is_list or not option.takes_empty_text)
    return is_empty or is_one_of(value, option.neutral)


def _from_file(option: "Option", value: Any) -> Any:
    if option.is_optional and value == NONE_TEXT:
        return None
    if not option.is_list:
        return _element_from_file(option, value)
    if not isinstance(value, list):
        raise UserError(f"{option.name} expects a list in square brackets, not {value!r}.")
    return [_element_from_file(option, element) for element in value]


def _element_from_file(option: "Option", value: Any) -> Any:
    """Return one value of an option: numbers also in quotes, 0 and 1 for a switch, a whole number for a text."""
    if isinstance(value, bool):  # an int for isinstance
        is_possible = option.value_type is bool
    elif isinstance(value, int):
        is_possible = option.value_type is not Path and not (option.value_type is str and option.is_list)
    else:
        takes_floats = option.value_type in (int, float, NumSteps)
        is_possible = isinstance(value, str) or (isinstance(value, float) and takes_floats)
    if not is_possible:
        raise option.refusal(value)
    try:
        return option.from_text(str(value))
    except UserError:
        raise option.refusal(value) from None


def toml_value(value: Any) -> Any:
    """Return the value of an option as TOML and JSON have it."""
    if value is None:  # which TOML does not have
        return NONE_TEXT
    if isinstance(value, list):
        return [toml_value(element) for element in value]
    if isinstance(value, NumSteps):  # a percentage is text in TOML
        return str(value) if value.is_fraction and value >= 1 else float(value)
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
