"""Declare a flag as a dataclass field, and turn what a user wrote for it into a checked value."""

import dataclasses
import difflib
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from library.config.errors import UserError

NONE_TEXT = "None"
TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})
_LONGEST_NAME = 255  # of a file or folder, in bytes; asking the system about a longer one is an error


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
    nargs: str | int | None = None,
) -> Any:
    """Return a dataclass field that becomes the flag `--<field name>`.

    The field's type says what values it takes: `str`, `int`, `float`, `bool` (a switch), `Path`, `list` of one of
    them (`nargs` "*" unless given), each also as `X | None`. `choices` are values of that type; `aliases` are other
    flags with the same meaning, dashes included.
    """
    metadata = {"help": help, "choices": choices, "aliases": tuple(aliases), "nargs": nargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def positional(help: str) -> Any:
    """Return a dataclass field that the next argument without a flag fills; such fields stand first in their class."""
    return dataclasses.field(metadata={"help": help, "is_positional": True})


@dataclasses.dataclass(frozen=True)
class Option:
    """One declared flag or positional argument: its name, what values it takes and what it means."""

    name: str
    help: str
    default: Any
    value_type: type
    is_optional: bool = False
    is_list: bool = False
    is_positional: bool = False
    choices: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()
    nargs: str | int | None = None

    @classmethod
    def of(cls, field: dataclasses.Field, annotation: Any) -> "Option":
        """Return what `field` declares; raise `TypeError` for a type that no flag can have."""
        value_type, is_optional = _without_none(annotation)
        is_list = get_origin(value_type) is list
        if is_list:
            (value_type,) = get_args(value_type)
        if value_type not in VALUE_KINDS:
            raise TypeError(f"the option '{field.name}' cannot have the type {annotation}")
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default  # type: ignore[operator]
        return cls(
            name=field.name,
            help=field.metadata["help"],
            default=None if default is dataclasses.MISSING else default,
            value_type=value_type,
            is_optional=is_optional,
            is_list=is_list,
            is_positional=field.metadata.get("is_positional", False),
            choices=tuple(field.metadata.get("choices") or ()),
            aliases=field.metadata.get("aliases", ()),
            nargs=field.metadata.get("nargs") or ("*" if is_list else None),
        )

    @property
    def flag(self) -> str:
        """The spelling on the command line: `--name`, or `name` for a positional argument."""
        return self.name if self.is_positional else f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether the flag is given without a value."""
        return self.value_type is bool and not self.is_list

    @property
    def expected(self) -> str:
        """What one value is, in words: "a whole number"."""
        return VALUE_KINDS[self.value_type].expected

    def from_text(self, text: str) -> Any:
        """Return the value that `text` on the command line stands for (of one element, for a list).

        Raise `UserError` naming the flag, the text and what was expected.
        """
        if self.is_optional and not self.is_list and text == NONE_TEXT:
            return None
        try:
            value = VALUE_KINDS[self.value_type].from_text(text)
        except ValueError:
            raise self._refusal(text) from None
        return self._among_choices(value)

    def from_toml(self, value: Any) -> Any:
        """Return the value that a TOML value stands for; raise `UserError` where type or choice do not fit."""
        if self.is_optional and value == NONE_TEXT:
            return None
        if not self.is_list:
            return self._element_from_toml(value)
        if not isinstance(value, list):
            raise UserError(f"{self.name} expects a list in square brackets, not {value!r}.")
        return [self._element_from_toml(element) for element in value]

    def _element_from_toml(self, value: Any) -> Any:
        # An exact match: True is an int for isinstance.
        if type(value) not in VALUE_KINDS[self.value_type].toml_types:
            raise self._refusal(value)
        return self.from_text(value) if self.value_type is Path else self._among_choices(self.value_type(value))

    def _among_choices(self, value: Any) -> Any:
        if self.choices and value not in self.choices:
            raise self._refusal(value)
        return value

    def _refusal(self, value: Any) -> UserError:
        expected = f"one of {', '.join(map(str, self.choices))}" if self.choices else self.expected
        or_none = f" or {NONE_TEXT}" if self.is_optional and not self.is_list else ""
        return UserError(f"{self.flag} expects {expected}{or_none}, not {value!r}.")


def options_of(option_class: type) -> list[Option]:
    """Return the options that a dataclass declares, in order."""
    annotations = get_type_hints(option_class)
    return [Option.of(field, annotations[field.name]) for field in dataclasses.fields(option_class)]


@dataclasses.dataclass(frozen=True)
class Spellings:
    """Flags known from other trainers that are no options here.

    `replaced` leads from an old flag to the flag, or to the `flag=value`, that says the same; `refused` leads from a
    flag to the sentence that tells why it is not offered and what to do instead.
    """

    replaced: Mapping[str, str]
    refused: Mapping[str, str]

    def current(self, flag: str) -> tuple[str, str | None]:
        """Today's flag for `flag`, and the value that the old spelling stood for (None where it stood for none)."""
        if flag not in self.replaced:
            return flag, None
        name, has_value, value = self.replaced[flag].partition("=")
        return name, value if has_value else None


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the sentence "Did you mean ...?" with the closest of `names`, or nothing where none is close."""
    names = list(names)
    matches = [each for each in names if each.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {matches[0]}?" if matches else ""


def error_of_problems(problems: Sequence[str]) -> UserError:
    """One error that lists every problem, a line each."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  ".join([f"{len(problems)} problems with the options:", *problems]))


@dataclasses.dataclass(frozen=True)
class _ValueKind:
    expected: str
    from_text: Callable[[str], Any]
    toml_types: tuple[type, ...]


def _is_true(text: str) -> bool:
    if text.lower() not in TRUE_WORDS | FALSE_WORDS:
        raise ValueError(text)
    return text.lower() in TRUE_WORDS


def _path(text: str) -> Path:
    # Path("") is the current folder: never what an empty shell variable was meant to say.
    if not text or "\0" in text or max(len(os.fsencode(part)) for part in text.split("/")) > _LONGEST_NAME:
        raise ValueError(text)
    return Path(text)


VALUE_KINDS: dict[type, _ValueKind] = {
    str: _ValueKind("text", str, (str,)),
    int: _ValueKind("a whole number", int, (int,)),
    float: _ValueKind("a number", float, (float, int)),
    bool: _ValueKind("true or false", _is_true, (bool,)),
    Path: _ValueKind("a path", _path, (str,)),
}


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other type as (itself, False)."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    if len(members) != 1:
        raise TypeError(f"an option has one type, or that type or None: {annotation}")
    return members[0], True
