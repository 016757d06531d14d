"""Dataclasses to flags to dataclasses: default, then `--config_file`, then the command line."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from transformers.hf_argparser import HfArgumentParser

from library.config.config_file import config_file_path, read_config_file, write_config_file
from library.config.errors import UserError
from library.config.option_fields import (
    Option,
    Spellings,
    error_of_problems,
    nearest,
    option,
    options_of,
    positional,
)

__all__ = ["ConfigFileOptions", "option", "parse_options", "positional"]

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class ConfigFileOptions:
    """Where options come from beside the command line."""

    _argument_group_name: ClassVar[str] = "Config file"

    config_file: Path | None = option(  # noqa: RUF009  # it makes a field
        None, "TOML file of options, flag names as keys; '.toml' may be left off. The command line overrides it."
    )
    output_config: bool = option(
        False, "Write the options in force to --config_file, which must not exist yet, and end without training."
    )

    def problems(self) -> Iterable[str]:
        """What cannot work."""
        if self.output_config and self.config_file is None:
            yield "--output_config needs --config_file: name the TOML file to write."


COMMAND_LINE_ONLY = {
    f"--{field.name}": "is read from the command line only; remove it from the file."
    for field in dataclasses.fields(ConfigFileOptions)
}


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str] | None,
    *,
    description: str,
    replaced: Mapping[str, str] = NOTHING,
    refused: Mapping[str, str] = NOTHING,
    conflicts: Callable[..., Iterable[str]] | None = None,
) -> tuple[Any, ...]:
    """One instance of each option class, in order, from `argv` (None: the arguments of this process).

    A value comes from the command line, else from the TOML file of `--config_file` (where `ConfigFileOptions` is
    among the classes), else from the field's default. `replaced` and `refused` are as `Spellings` says.
    `conflicts(*instances)` gives sentences about combinations across classes; they are reported together with what
    every class says of itself in its own `problems()`, in one `UserError`.

    Raises `UserError` for whatever the user can mend. With `--output_config` the file is written, unchecked so that
    an unfinished command can be kept as a template, and `SystemExit(0)` is raised, as by `--help`.
    """
    spellings = Spellings(replaced, refused)
    options = [each for option_class in option_classes for each in options_of(option_class)]
    parser = _OptionParser(option_classes, description=description, usage=_usage(options))
    argv = sys.argv[1:] if argv is None else argv
    arguments = _todays_arguments(argv, options, spellings)
    instances = parser.instances(arguments)

    source = next((each for each in instances if isinstance(each, ConfigFileOptions)), ConfigFileOptions())
    if source.config_file is not None:
        path = config_file_path(source.config_file)
        if source.output_config:
            write_config_file(path, [each for each in instances if each is not source])
            print(f"wrote the options to '{path}'")
            raise SystemExit(0)
        in_file = dataclasses.replace(spellings, refused={**refused, **COMMAND_LINE_ONLY})
        parser.set_defaults(**read_config_file(path, options, in_file))
        instances = parser.instances(arguments)

    problems = [problem for each in instances if hasattr(each, "problems") for problem in each.problems()]
    problems += conflicts(*instances) if conflicts else ()
    problems += _overruled(argv, instances, spellings)
    if problems:
        raise error_of_problems(problems)
    return instances


class _OptionParser(HfArgumentParser):
    """`HfArgumentParser` whose flags are `Option`s and whose errors are `UserError`s."""

    def __init__(self, option_classes: Sequence[type], **kwargs: Any):
        super().__init__(option_classes, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: dataclasses.Field) -> None:
        """Add the argument of one field.

        Replaces the method of the same name, which turns every "_" into a second spelling, makes a list demand an
        element, and lets a switch swallow the argument behind it.
        """
        declared = Option.of(field, field.type)
        settings: dict[str, Any] = {"type": declared.from_text, "help": declared.help.replace("%", "%%")}
        if declared.nargs is not None:
            settings["nargs"] = declared.nargs
        if declared.choices:
            settings["metavar"] = f"{{{','.join(map(str, declared.choices))}}}"
        if declared.is_switch:
            settings |= {"nargs": "?", "const": True}
        if not declared.is_positional:
            settings["default"] = declared.default
        parser.add_argument(declared.flag, *declared.aliases, **settings)

    def instances(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One instance of each class; raises `UserError` for arguments that belong to no option."""
        # look_for_args_file would read "<script>.args" and split Windows paths at their spaces.
        *instances, unexpected = self.parse_args_into_dataclasses(
            list(arguments), return_remaining_strings=True, look_for_args_file=False
        )
        if unexpected:
            raise UserError(
                f"unexpected argument {unexpected[0]!r}.",
                "Put a value that holds spaces in quotes, and give a switch its value as --switch=false.",
            )
        return tuple(instances)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print together with the whole usage."""
        lacks_value = message.endswith("expected one argument")
        remedy = "Give a value that begins with '-' as --flag=value." if lacks_value else "See --help."
        raise UserError(f"{message.removeprefix('argument ')}.", remedy)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and switches as the bare flags that users write."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)


def _usage(options: Sequence[Option]) -> str:
    return " ".join(["%(prog)s", *(each.name for each in options if each.is_positional), "[--flag value ...]"])


def _todays_arguments(argv: Sequence[str], options: Sequence[Option], spellings: Spellings) -> list[str]:
    """`argv` in the spelling of the declared flags; raises one `UserError` for all that are refused or unknown."""
    known = {name: each for each in options if not each.is_positional for name in (each.flag, *each.aliases)}
    end = list(argv).index("--") if "--" in argv else len(argv)
    arguments: list[str] = []
    problems = []
    for argument in argv[:end]:
        try:
            arguments += _todays_spelling(argument, known, spellings)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise error_of_problems(problems)
    return [*arguments, *argv[end:]]


def _todays_spelling(argument: str, known: Mapping[str, Option], spellings: Spellings) -> list[str]:
    written, equals, value = argument.partition("=")
    if not written.startswith("--") or " " in written or written == "--help":
        return [argument]
    old_flag = _with_underscores(written)
    if old_flag in spellings.refused:
        raise UserError(f"{written}: {spellings.refused[old_flag]}")
    flag, stands_for = spellings.current(old_flag)
    if flag not in known:
        raise UserError(f"unknown flag {written}.", nearest(old_flag, known) or "See --help.")
    if stands_for is not None:
        if equals:
            raise UserError(f"{written} takes no value: it means {flag}={stands_for}.")
        return [f"{flag}={stands_for}"]
    if known[flag].is_switch:
        return [f"{flag}={value or 'true'}"]
    return [f"{flag}{equals}{value}"]


def _with_underscores(flag: str) -> str:
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag


def _overruled(argv: Sequence[str], instances: Sequence[Any], spellings: Spellings) -> Iterator[str]:
    """Old spellings on the command line that another flag there contradicts."""
    values = {name: value for each in instances for name, value in vars(each).items()}
    for argument in argv:
        flag, stands_for = spellings.current(_with_underscores(argument))
        if stands_for is not None and str(values[flag[2:]]) != stands_for:
            yield f"{argument} means {flag}={stands_for}, but {flag} is {values[flag[2:]]} as well. Keep one of them."
