"""Dataclass fields to flags, and flags to dataclasses: default, then `--config_file`, then the command line."""

import dataclasses
import logging
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from library.config.config_file import NONE_TEXT, config_file_path, read_config_file, write_config_file
from library.config.errors import UserError, error_of_problems
from library.config.option_parser import OptionParser
from library.config.spellings import Spellings, is_one_of
from library.config.value_kinds import KINDS

log = logging.getLogger(__name__)

# -- one option -------------------------------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    nargs: str | int | None = None,
    least: float | None = None,
    most: float | None = None,
    bare: Any = None,
    secret: bool = False,
) -> Any:
    """Return a dataclass field that becomes the flag `--<field name>`.

    The type of the field decides which values it takes: `str`, `int`, `float`, `bool` (a switch), `Path`, a `list` of
    one of them (`nargs` "*" by default), each also as `X | None`. `choices` are values of that type; `aliases` are
    other flags with the same meaning, dashes included. A number must lie between `least` and `most`, both included.
    `bare` is the value of the flag where it stands alone. A `secret` value is written to no file and no log.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices or ()),
        "aliases": tuple(aliases),
        "nargs": nargs,
        "least": least,
        "most": most,
        "bare": bare,
        "secret": secret,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_secret(field: dataclasses.Field) -> bool:
    """Return whether the value of an option's field must be written nowhere."""
    return bool(field.metadata.get("secret"))


def positional(help: str) -> Any:
    """Return a dataclass field that takes the next argument without a flag; such fields stand first in their class."""
    return dataclasses.field(metadata={"help": help, "is_positional": True})


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
    neutral: tuple[str, ...] = ()  # values that mean the same as leaving the flag out
    least: float | None = None
    most: float | None = None
    bare: Any = None
    is_secret: bool = False

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
        return KINDS[self.value_type][0]

    @property
    def takes_empty_text(self) -> bool:
        """Whether an empty text is a value like any other."""
        return self.value_type is str and not self.choices

    def from_text(self, text: str) -> Any:
        """Return the value of `text` (of one element, for a list).

        Raise `UserError` with the flag, the text and what is expected.
        """
        if self.is_optional and not self.is_list and (text == NONE_TEXT or (not text and not self.takes_empty_text)):
            return None
        if is_one_of(text, self.neutral):
            return self.default
        try:
            value = KINDS[self.value_type][1](text)
        except ValueError:
            raise self.refusal(text) from None
        return self.among_choices(value)

    def among_choices(self, value: Any) -> Any:
        """Return `value`, or the choice that it is in any case. Raise `UserError` if it is none of the choices."""
        if not self.choices or value in self.choices:
            return value
        in_any_case = {str(choice).casefold(): choice for choice in self.choices}
        if not isinstance(value, str) or value.casefold() not in in_any_case:
            raise self.refusal(value)
        return in_any_case[value.casefold()]

    def bound_problem(self, value: Any) -> str | None:
        """Return what is wrong with the size of a number, in a sentence; None for one between the bounds."""
        if value is None:
            return None
        if self.least is not None and not value >= self.least:  # NaN is neither
            return f"{self.flag} is {value}; it must be {self.least:.12g} or more."
        if self.most is not None and not value <= self.most:
            return f"{self.flag} is {value}; it must be {self.most:.12g} or less."
        return None

    def refusal(self, value: Any) -> UserError:
        """Return the error for a value that the option cannot take."""
        expected = f"one of {', '.join(map(str, self.choices))}" if self.choices else self.expected
        or_none = f" or {NONE_TEXT}" if self.is_optional and not self.is_list else ""
        return UserError(f"{self.flag} expects {expected}{or_none}, not {value!r}.")


def options_of(option_class: type) -> list[Option]:
    """Return the options that a dataclass declares, in order. Raise `TypeError` for a type that no flag can have."""
    annotations = get_type_hints(option_class)
    return [_option_of(field, annotations[field.name]) for field in dataclasses.fields(option_class)]


def problems_of(instance: Any) -> list[str]:
    """Return what is wrong with the values of an option class, one sentence each: bounds, then its `problems()`."""
    of_bounds = {each.flag: each.bound_problem(getattr(instance, each.name)) for each in options_of(type(instance))}
    wrong = {flag: problem for flag, problem in of_bounds.items() if problem is not None}
    rest = [problem for problem in _said("problems", [instance]) if problem.partition(" ")[0] not in wrong]
    return [*wrong.values(), *rest]


def changed_options(instance: Any, names: Iterable[str]) -> list[str]:
    """Return those of the options `names` of an option class whose value is not their default."""
    fields = type(instance).__dataclass_fields__
    return [name for name in names if getattr(instance, name) != fields[name].default]


def _option_of(field: dataclasses.Field, annotation: Any) -> Option:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    value_types = [member for member in members if member is not types.NoneType]
    is_list = get_origin(value_types[0]) is list
    value_type = get_args(value_types[0])[0] if is_list else value_types[0]
    if len(value_types) != 1 or value_type not in KINDS:
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
        least=said.get("least"),
        most=said.get("most"),
        bare=said.get("bare"),
        is_secret=is_secret(field),
    )


# -- from the command line --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConfigFileOptions:
    """Options from a file."""

    _argument_group_name: ClassVar[str] = "Config file"

    config_file: Path | None = option(
        None,
        "Read options from this TOML file, flag names as keys; '.toml' may be left off. The command line overrides it. "
        "A .json file is read as what the settings window of kohya's family saves.",
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


_NO_SPELLINGS = Spellings()


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str] | None,
    *,
    description: str,
    spellings: Spellings = _NO_SPELLINGS,
    conflicts: Callable[..., Iterable[str]] = lambda *instances: (),
    heavy_conflicts: Callable[..., Iterable[str]] = lambda *instances: (),
    is_draft: bool = False,
) -> tuple[Any, ...]:
    """Return one instance of each option class, in order, from `argv` (None: the arguments of this process).

    A value comes from the command line, else from the TOML file of `--config_file` (if `ConfigFileOptions` is among the
    classes), else from the field's default. `spellings` are those of other programs.

    What cannot work is reported together, in one `UserError`: the `problems_of` each class, and the sentences of
    `conflicts(*instances)` about combinations across classes. Only if there is nothing to report is each class asked
    for its `heavy_problems()`, which may import torch and write files for trial; `heavy_conflicts` are asked for last.
    Neither is asked for where `is_draft`: the command is still being written.

    Raise `UserError` for whatever the user can fix. With `--output_config` the file is written, unchecked so that an
    unfinished command can be kept as a template, and `SystemExit(0)` is raised, as by `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OptionParser(_options_of_each(option_classes, spellings), description)
    parser.hide_secrets(sys.argv)
    arguments = spellings.current_arguments(argv, parser.options)
    instances = parser.instances(arguments)
    source = next((each for each in instances if isinstance(each, ConfigFileOptions)), ConfigFileOptions())
    if source.config_file is not None:
        path = config_file_path(source.config_file)
        if source.output_config:
            write_config_file(path, [each for each in instances if each is not source], parser.options)
            log.info("wrote the options to '%s'", path)
            raise SystemExit(0)
        in_file = dataclasses.replace(spellings, refused={**spellings.refused, **_NOT_IN_A_FILE})
        values = read_config_file(path, parser.options, in_file)
        parser.set_defaults(**values)
        instances = parser.instances(arguments)
        idle = {name for name in values if not _is_on(spellings.idle.get(name), instances)}
        parser.set_defaults(**{each.name: each.default for each in parser.options if each.name in idle})
        instances = parser.instances(arguments)

    own_problems = [problem for each in instances for problem in problems_of(each)]
    problems = [*own_problems, *conflicts(*instances), *spellings.overruled(argv, instances)]
    if not problems and not is_draft:
        problems = _said("heavy_problems", instances) or list(heavy_conflicts(*instances))
    if problems:
        raise error_of_problems(problems)
    return instances


def _options_of_each(option_classes: Sequence[type], spellings: Spellings) -> dict[type, list[Option]]:
    neutral = spellings.neutral
    return {
        option_class: [
            dataclasses.replace(each, neutral=tuple(neutral.get(each.flag, ()))) for each in options_of(option_class)
        ]
        for option_class in option_classes
    }


def _is_on(switch: str | None, instances: Sequence[Any]) -> bool:
    """Return whether a switch is on, among the options of `instances`; no switch is."""
    return switch is None or any(getattr(each, switch, False) for each in instances)


def _said(method: str, instances: Sequence[Any]) -> list[str]:
    return [problem for each in instances if hasattr(each, method) for problem in getattr(each, method)()]
