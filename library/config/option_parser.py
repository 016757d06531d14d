"""The standard argparse with the flags of options, whose errors are those of a user."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from library.config.errors import UserError

if TYPE_CHECKING:
    from library.config.options import Option

HIDDEN = "(hidden)"
"""Stands for a secret."""


class OptionParser(argparse.ArgumentParser):
    """A parser whose flags are `Option`s, a group for each class, and whose errors are `UserError`s."""

    def __init__(self, of_class: Mapping[type, Sequence["Option"]], description: str):
        self.of_class = of_class
        self.options = [each for options in self.of_class.values() for each in options]
        words = ["%(prog)s", *(each.name for each in self.options if each.is_positional), "[--flag value ...]"]
        super().__init__(
            usage=" ".join(words), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
        )
        for option_class, options in self.of_class.items():
            group = self.add_argument_group(getattr(option_class, "_argument_group_name", None))
            for each in options:
                group.add_argument(each.flag, *each.aliases, **_settings(each))

    def hide_secrets(self, arguments: list[str]) -> None:
        """Replace the values of secret flags in `arguments`, which libraries such as wandb copy into their logs."""
        flags = {each.flag for each in self.options if each.is_secret}
        for place, argument in enumerate(arguments):
            flag, equals, _ = argument.replace("-", "_").replace("__", "--", 1).partition("=")
            if flag in flags and equals:
                arguments[place] = f"{flag}={HIDDEN}"
            elif flag in flags and place + 1 < len(arguments):
                arguments[place + 1] = HIDDEN

    def instances(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each class. Raise `UserError` for arguments that belong to no option."""
        values, unexpected = self.parse_known_args(list(arguments))
        if unexpected:
            raise UserError(
                f"unexpected argument {unexpected[0]!r}.",
                "Put a value that holds spaces in quotes, and write the value of a switch as --switch=false.",
            )
        return tuple(
            option_class(**{each.name: _none_if_empty(each, getattr(values, each.name)) for each in options})
            for option_class, options in self.of_class.items()
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the whole usage."""
        lacks_value = message.endswith("expected one argument")
        remedy = "Write a value that begins with '-' as --flag=value." if lacks_value else "See --help."
        raise UserError(f"{message.removeprefix('argument ')}.", remedy)


def _none_if_empty(option: "Option", value: Any) -> Any:
    return None if option.is_list and option.is_optional and value in ([], [""]) else value


def _settings(each: "Option") -> dict[str, Any]:
    """Return the settings of `add_argument`."""
    settings: dict[str, Any] = {"type": each.from_text, "help": each.help.replace("%", "%%"), "nargs": each.nargs}
    if each.choices:
        settings["metavar"] = f"{{{','.join(map(str, each.choices))}}}"
    if each.is_switch:
        settings |= {"nargs": "?", "const": True}
    if each.bare is not None:
        settings |= {"nargs": "?", "const": each.bare}
    if not each.is_positional:
        settings |= {"default": each.default, "dest": each.name}
    return settings


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and switches as the bare flags that users write."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)
