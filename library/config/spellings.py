"""Flags as users of other trainers write them: read as today's flags, or refused with the reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.config.errors import UserError, error_of_problems, nearest

if TYPE_CHECKING:
    from library.config.options import Option


@dataclass(frozen=True)
class Spellings:
    """Flags known from other trainers that are no options here.

    `replaced` maps an old flag to the flag, or to the `flag=value`, with the same meaning; `refused` maps a flag to
    the sentences that say why it is not offered and what to do instead.
    """

    replaced: Mapping[str, str]
    refused: Mapping[str, str]

    def current(self, flag: str) -> tuple[str, str | None]:
        """Return the current flag for `flag`, and the value that the old spelling implies (None if it implies none)."""
        if flag not in self.replaced:
            return flag, None
        name, has_value, value = self.replaced[flag].partition("=")
        return name, value if has_value else None

    def current_arguments(self, argv: Sequence[str], options: Sequence["Option"]) -> list[str]:
        """Return `argv` in the spelling of `options`. Raise one `UserError` for all refused and unknown flags."""
        known = {name: each for each in options if not each.is_positional for name in (each.flag, *each.aliases)}
        end = list(argv).index("--") if "--" in argv else len(argv)
        arguments, problems = [], []
        for argument in argv[:end]:
            try:
                arguments.append(self._current_argument(argument, known))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise error_of_problems(problems)
        return [*arguments, *argv[end:]]

    def _current_argument(self, argument: str, known: Mapping[str, "Option"]) -> str:
        written, equals, value = argument.partition("=")
        if not written.startswith("--") or " " in written or written == "--help":
            return argument
        old_flag = _with_underscores(written)
        if old_flag in self.refused:
            raise UserError(f"{written}: {self.refused[old_flag]}")
        flag, implied = self.current(old_flag)
        if flag not in known:
            raise UserError(f"unknown flag {written}.", nearest(old_flag, known) or "See --help.")
        if implied is not None:
            if equals:
                raise UserError(f"{written} takes no value: it means {flag}={implied}.")
            return f"{flag}={implied}"
        if known[flag].is_switch:  # with its value, so that it does not take the argument behind it
            return f"{flag}={value or 'true'}"
        return f"{flag}{equals}{value}"

    def overruled(self, argv: Sequence[str], instances: Sequence[Any]) -> Iterator[str]:
        """Yield a sentence for each old spelling in `argv` that another flag contradicts."""
        values = {name: value for each in instances for name, value in vars(each).items()}
        for argument in argv:
            flag, implied = self.current(_with_underscores(argument))
            if implied is not None and str(values[flag[2:]]) != implied:
                yield f"{argument} means {flag}={implied}, but {flag} is {values[flag[2:]]} as well. Keep one of them."


def _with_underscores(flag: str) -> str:
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
