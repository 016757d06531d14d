"""Dataclasses to flags to dataclasses: default, then `--config_file`, then the command line."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

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

log = logging.getLogger(__name__)

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class ConfigFileOptions:
    """Options from a file."""

    _argument_group_name: ClassVar[str] = "Config file"

    config_file: Path | None = option(  # noqa: RUF009  # it makes a field
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
            log.info("wrote the options to '%s'", path)
            raise SystemExit(0)
        in_file = dataclasses.replace(spellings, refused={**refused, **COMMAND_LINE_ONLY})
        parser.set_defaults(**read_config_file(path, options, in_file))
        instances = parser.instances(arguments)

    problems = [problem for each in instances if hasattr(each, "problems") for problem in each.problems()]
    problems += conflicts(*instances) if conflicts else ()
    problems += _overruled(argv, instances, spellings)
    if not problems:  # what takes seconds to import is tried last
        heavy = [each for each in instances if hasattr(each, "heavy_problems")]
        problems = [problem for each in heavy for problem in each.heavy_problems()]
    if problems:
        raise error_of_problems(problems)
    return instances


class _OptionParser(argparse.ArgumentParser):
    """A parser whose flags are `Option`s, a group for each class, and whose errors are `UserError`s."""

    def __init__(self, option_classes: Sequence[type], **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self._option_classes = option_classes
        for option_class in option_classes:
            group = self.add_argument_group(getattr(option_class, "_argument_group_name", None))
            for declared in options_of(option_class):
                group.add_argument(declared.flag, *declared.aliases, **_argument_settings(declared))

    def instances(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each class. Raise `UserError` for arguments that belong to no option."""
        values, unexpected = self.parse_known_args(list(arguments))
        if unexpected:
            raise UserError(
                f"unexpected argument {unexpected[0]!r}.",
                "Put a value that holds spaces in quotes, and give a switch its value as --switch=false.",
            )
        return tuple(
            option_class(**{declared.name: getattr(values, declared.name) for declared in options_of(option_class)})
            for option_class in self._option_classes
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the whole usage."""
        lacks_value = message.endswith("expected one argument")
        remedy = "Give a value that begins with '-' as --flag=value." if lacks_value else "See --help."
        raise UserError(f"{message.removeprefix('argument ')}.", remedy)


def _argument_settings(declared: Option) -> dict[str, Any]:
    """Return the settings of `add_argument`. A switch takes its value behind "=" only, never the next argument."""
    settings: dict[str, Any] = {"type": declared.from_text, "help": declared.help.replace("%", "%%")}
    if declared.nargs is not None:
        settings["nargs"] = declared.nargs
    if declared.choices:
        settings["metavar"] = f"{{{','.join(map(str, declared.choices))}}}"
    if declared.is_switch:
        settings |= {"nargs": "?", "const": True}
    if not declared.is_positional:
        settings |= {"default": declared.default, "dest": declared.name}
    return settings


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and switches as the bare flags that users write."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)


def _usage(options: Sequence[Option]) -> str:
    return " ".join(["%(prog)s", *(each.name for each in options if each.is_positional), "[--flag value ...]"])


def _todays_arguments(argv: Sequence[str], options: Sequence[Option], spellings: Spellings) -> list[str]:
    """Return `argv` in the spelling of the declared flags. Raise one `UserError` for all refused or unknown ones."""
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
    """Yield old spellings on the command line that another flag there contradicts."""
    values = {name: value for each in instances for name, value in vars(each).items()}
    for argument in argv:
        flag, stands_for = spellings.current(_with_underscores(argument))
        if stands_for is not None and str(values[flag[2:]]) != stands_for:
            yield f"{argument} means {flag}={stands_for}, but {flag} is {values[flag[2:]]} as well. Keep one of them."
