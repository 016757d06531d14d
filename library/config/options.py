"""Dataclass fields to flags, and flags to dataclasses: default, then `--config_file`, then the command line."""

import argparse
import dataclasses
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin, get_type_hints

from library.config.config_file import NONE_TEXT, config_file_path, read_config_file, write_config_file
from library.config.errors import UserError, error_of_problems
from library.config.spellings import Spellings

log = logging.getLogger(__name__)

_WORDS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
_LONGEST_NAME = 255  # of a file or folder, in bytes; asking the system about a longer one is an error


# -- one option -------------------------------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    nargs: str | int | None = None,
) -> Any:
    """Return a dataclass field that becomes the flag `--<field name>`.

    The type of the field decides which values it takes: `str`, `int`, `float`, `bool` (a switch), `Path`, a `list` of
    one of them (`nargs` "*" by default), each also as `X | None`. `choices` are values of that type; `aliases` are
    other flags with the same meaning, dashes included.
    """
    metadata = {"help": help, "choices": tuple(choices or ()), "aliases": tuple(aliases), "nargs": nargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def positional(help: str) -> Any:
    """Return a dataclass field that takes the next argument without a flag; such fields stand first in their class."""
    return dataclasses.field(metadata={"help": help, "is_positional": True})


def _truth(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError(text)
    return _WORDS[text.lower()]


def _path(text: str) -> Path:
    # Path("") is the current folder, which an empty shell variable was never meant to be.
    if not text or "\0" in text or max(len(os.fsencode(part)) for part in text.split("/")) > _LONGEST_NAME:
        raise ValueError(text)
    return Path(text)


# For each type of value: what to call it in messages, and how to read it.
_KINDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    str: ("text", str),
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", _truth),
    Path: ("a path", _path),
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One declared flag or positional argument: its name, which values it takes and what it means."""

    name: str
    help: str
    default: Any  # None for a positional argument
    value_type: type
    is_optional: bool = False
    is_list: bool = False
    is_positional: bool = False
    choices: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()
    nargs: str | int | None = None

    @property
    def flag(self) -> str:
        """The spelling on the command line: `--name`, or `name` for a positional argument."""
        return self.name if self.is_positional else f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether the flag needs no value."""
        return self.value_type is bool and not self.is_list

    @property
    def expected(self) -> str:
        """What one value is, in words: "a whole number"."""
        return _KINDS[self.value_type][0]

    def from_text(self, text: str) -> Any:
        """Return the value of `text` (of one element, for a list).

        Raise `UserError` with the flag, the text and what is expected.
        """
        if self.is_optional and not self.is_list and text == NONE_TEXT:
            return None
        try:
            value = _KINDS[self.value_type][1](text)
        except ValueError:
            raise self.refusal(text) from None
        return self.among_choices(value)

    def among_choices(self, value: Any) -> Any:
        """Return `value`. Raise `UserError` if the option has choices and this is none of them."""
        if self.choices and value not in self.choices:
            raise self.refusal(value)
        return value

    def refusal(self, value: Any) -> UserError:
        """Return the error for a value that the option cannot take."""
        expected = f"one of {', '.join(map(str, self.choices))}" if self.choices else self.expected
        or_none = f" or {NONE_TEXT}" if self.is_optional and not self.is_list else ""
        return UserError(f"{self.flag} expects {expected}{or_none}, not {value!r}.")


def options_of(option_class: type) -> list[Option]:
    """Return the options that a dataclass declares, in order. Raise `TypeError` for a type that no flag can have."""
    annotations = get_type_hints(option_class)
    return [_option_of(field, annotations[field.name]) for field in dataclasses.fields(option_class)]


def _option_of(field: dataclasses.Field, annotation: Any) -> Option:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    value_types = [member for member in members if member is not types.NoneType]
    is_list = get_origin(value_types[0]) is list
    value_type = get_args(value_types[0])[0] if is_list else value_types[0]
    if len(value_types) != 1 or value_type not in _KINDS:
        raise TypeError(f"the option '{field.name}' cannot have the type {annotation}")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    said = field.metadata
    return Option(
        name=field.name,
        help=said["help"],
        default=None if default is dataclasses.MISSING else default,
        value_type=value_type,
        is_optional=len(members) > 1,
        is_list=is_list,
        is_positional=said.get("is_positional", False),
        choices=said.get("choices", ()),
        aliases=said.get("aliases", ()),
        nargs=said.get("nargs") or ("*" if is_list else None),
    )


# -- from the command line --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConfigFileOptions:
    """Options from a file."""

    _argument_group_name: ClassVar[str] = "Config file"

    config_file: Path | None = option(
        None,
        "Read options from this TOML file, flag names as keys; '.toml' may be left off. The command line overrides it.",
    )
    output_config: bool = option(
        False, "Write the current options to --config_file, which must not exist yet, and exit without training."
    )

    def problems(self) -> Iterable[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.output_config and self.config_file is None:
            yield "--output_config needs --config_file: name the TOML file to write."


_NOT_IN_A_FILE = dict.fromkeys(
    (each.flag for each in options_of(ConfigFileOptions)),
    "is read from the command line only; remove it from the file.",
)


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str] | None,
    *,
    description: str,
    replaced: Mapping[str, str] = types.MappingProxyType({}),
    refused: Mapping[str, str] = types.MappingProxyType({}),
    conflicts: Callable[..., Iterable[str]] = lambda *instances: (),
) -> tuple[Any, ...]:
    """Return one instance of each option class, in order, from `argv` (None: the arguments of this process).

    A value comes from the command line, else from the TOML file of `--config_file` (if `ConfigFileOptions` is among the
    classes), else from the field's default. `replaced` and `refused` are described at `Spellings`.

    What cannot work is reported together, in one `UserError`: what each class yields in `problems()`, and the sentences
    of `conflicts(*instances)` about combinations across classes. Only if there is nothing to report is each class asked
    for its `heavy_problems()`, which may import torch.

    Raise `UserError` for whatever the user can fix. With `--output_config` the file is written, unchecked so that an
    unfinished command can be kept as a template, and `SystemExit(0)` is raised, as by `--help`.
    """
    spellings = Spellings(replaced, refused)
    argv = sys.argv[1:] if argv is None else argv
    parser = _OptionParser(option_classes, description)
    arguments = spellings.current_arguments(argv, parser.options)
    instances = parser.instances(arguments)
    source = next((each for each in instances if isinstance(each, ConfigFileOptions)), ConfigFileOptions())
    if source.config_file is not None:
        path = config_file_path(source.config_file)
        if source.output_config:
            write_config_file(path, [each for each in instances if each is not source], parser.options)
            log.info("wrote the options to '%s'", path)
            raise SystemExit(0)
        in_file = Spellings(replaced, {**refused, **_NOT_IN_A_FILE})
        parser.set_defaults(**read_config_file(path, parser.options, in_file))
        instances = parser.instances(arguments)

    problems = [*_said("problems", instances), *conflicts(*instances), *spellings.overruled(argv, instances)]
    problems = problems or _said("heavy_problems", instances)
    if problems:
        raise error_of_problems(problems)
    return instances


def _said(method: str, instances: Sequence[Any]) -> list[str]:
    return [problem for each in instances if hasattr(each, method) for problem in getattr(each, method)()]


class _OptionParser(argparse.ArgumentParser):
    """A parser whose flags are `Option`s, a group for each class, and whose errors are `UserError`s."""

    def __init__(self, option_classes: Sequence[type], description: str):
        self.of_class = {option_class: options_of(option_class) for option_class in option_classes}
        self.options = [each for options in self.of_class.values() for each in options]
        words = ["%(prog)s", *(each.name for each in self.options if each.is_positional), "[--flag value ...]"]
        super().__init__(
            usage=" ".join(words), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
        )
        for option_class, options in self.of_class.items():
            group = self.add_argument_group(getattr(option_class, "_argument_group_name", None))
            for each in options:
                group.add_argument(each.flag, *each.aliases, **_settings(each))

    def instances(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each class. Raise `UserError` for arguments that belong to no option."""
        values, unexpected = self.parse_known_args(list(arguments))
        if unexpected:
            raise UserError(
                f"unexpected argument {unexpected[0]!r}.",
                "Put a value that holds spaces in quotes, and write the value of a switch as --switch=false.",
            )
        return tuple(
            option_class(**{each.name: getattr(values, each.name) for each in options})
            for option_class, options in self.of_class.items()
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the whole usage."""
        lacks_value = message.endswith("expected one argument")
        remedy = "Write a value that begins with '-' as --flag=value." if lacks_value else "See --help."
        raise UserError(f"{message.removeprefix('argument ')}.", remedy)


def _settings(each: Option) -> dict[str, Any]:
    """Return the settings of `add_argument`."""
    settings: dict[str, Any] = {"type": each.from_text, "help": each.help.replace("%", "%%"), "nargs": each.nargs}
    if each.choices:
        settings["metavar"] = f"{{{','.join(map(str, each.choices))}}}"
    if each.is_switch:
        settings |= {"nargs": "?", "const": True}
    if not each.is_positional:
        settings |= {"default": each.default, "dest": each.name}
    return settings


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and switches as the bare flags that users write."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)
