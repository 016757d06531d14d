"""Flags as users of other trainers write them: read as today's flags, or refused with the reason."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.config.errors import UserError, error_of_problems, listed, nearest
from library.config.wishes import Wish, granted

if TYPE_CHECKING:
    from library.config.options import Option

_OFF = ("", "none", "false", "no", "off", "0")
_ON = ("true", "yes", "on")


@dataclass(frozen=True)
class Spellings:
    """Flags known from other trainers that are no options here, and values that ask for nothing.

    `replaced` maps an old flag to the flag, or to the `flag=value`, with the same meaning; `refused` maps a flag to
    the sentences that say why it is not offered and what to do instead.

    A refused flag is skipped where its value asks for nothing: false, 0, none, empty, or one of its values in
    `neutral_refused`. For an option, the values in `neutral` mean the same as leaving it out. `lists` names refused
    flags that take any number of values, none included.

    In files only: keys in `file_only` belong to other programs and are skipped, and a key of `idle` is skipped unless
    the switch it maps to is on. `wishes` answer unknown flags.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Sequence[str]] = field(default_factory=dict)
    neutral_refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lists: Collection[str] = ()
    file_only: Collection[str] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    wishes: Sequence[Wish] = ()

    def current(self, flag: str) -> tuple[str, str | None]:
        """Return the current flag for `flag`, and the value that the old spelling implies (None if it implies none)."""
        if flag not in self.replaced:
            return flag, None
        name, has_value, value = self.replaced[flag].partition("=")
        return name, value if has_value else None

    def asks_for_nothing(self, flag: str, value: Any) -> bool:
        """Return whether a refused or replaced flag with this value means the same as leaving it out."""
        return is_off(value) or is_one_of(value, self.neutral_refused.get(flag, ()))

    def advice(self, flag: str, known: Collection[str]) -> str:
        """Return what to do instead of an unknown flag, or "" if nothing is known of it."""
        return granted(flag, known, self.wishes) or nearest(flag, known)

    def current_arguments(self, argv: Sequence[str], options: Sequence["Option"]) -> list[str]:
        """Return `argv` in the spelling of `options`. Raise one `UserError` for all refused and unknown flags."""
        known = {name: each for each in options if not each.is_positional for name in (each.flag, *each.aliases)}
        end = list(argv).index("--") if "--" in argv else len(argv)
        arguments: list[str] = []
        problems: list[str] = []
        refused = Refusals()
        written = list(argv[:end])
        while written:
            argument = written.pop(0)
            behind = None if any(each.is_positional for each in options) else _next_value(written)
            try:
                current, num_read = self._current_argument(argument, behind, known)
            except Refused as refusal:
                refused.add(refusal)
            except UserError as error:
                problems.append(str(error))
            else:
                arguments += current
                del written[:num_read]
        if problems or refused:
            raise error_of_problems([*refused.problems(), *problems])
        return [*arguments, *argv[end:]]

    def _current_argument(
        self, argument: str, behind: str | None, known: Mapping[str, "Option"]
    ) -> tuple[list[str], int]:
        """Return the arguments that stand for `argument`, and whether `behind`, the next one, was read as its value."""
        written, equals, value = argument.partition("=")
        if not written.startswith("--") or " " in written or written == "--help":
            return [argument], 0
        old_flag = _with_underscores(written)
        flag, implied = self.current(old_flag)
        if old_flag in self.refused or implied is not None:
            given, num_read = self._own_value(old_flag, value if equals else None, behind)
            return self._instead(written, old_flag, given), num_read
        if flag not in known:
            raise UserError(f"unknown flag {written}.", self.advice(old_flag, known) or "See --help.")
        if value == "--":  # which argparse takes for the end of all flags
            raise UserError(f"{written} is '--', which is no value.", "Write another one, or leave the flag out.")
        if known[flag].is_switch:  # with its value, so that it does not take the argument behind it
            return ([] if equals and not value else [f"{flag}={value or 'true'}"]), 0
        return [f"{flag}{equals}{value}"], 0

    def _own_value(self, flag: str, value: str | None, behind: str | None) -> tuple[str, int]:
        """Return the value of a flag that is refused or implies one, and whether that is the argument `behind` it."""
        if value is not None:
            return value, 0
        if behind is not None and (flag in self.refused or self.asks_for_nothing(flag, behind) or _is_on(behind)):
            return behind, 1
        return ("" if flag in self.lists else "true"), 0

    def _instead(self, written: str, old_flag: str, given: str) -> list[str]:
        """Return what stands for a refused flag, or for one that implies a value; `given` is its own value."""
        if self.asks_for_nothing(old_flag, given):
            return []
        if old_flag in self.refused:
            raise Refused(written, self.refused[old_flag])
        if not _is_on(given):
            raise UserError(f"{written} takes no value: it means {self.replaced[old_flag]}.")
        return [self.replaced[old_flag]]

    def overruled(self, argv: Sequence[str], instances: Sequence[Any]) -> Iterator[str]:
        """Yield a sentence for each old spelling in `argv` that another flag contradicts."""
        values = {name: value for each in instances for name, value in vars(each).items()}
        for place, argument in enumerate(argv):
            written, equals, value = argument.partition("=")
            old_flag = _with_underscores(written)
            flag, implied = self.current(old_flag)
            if implied is None:
                continue
            given, _ = self._own_value(old_flag, value if equals else None, _next_value(argv[place + 1 :]))
            if not self.asks_for_nothing(old_flag, given) and str(values[flag[2:]]).lower() != implied.lower():
                yield f"{written} means {flag}={implied}, but {flag} is {values[flag[2:]]} as well. Keep one of them."


class Refused(UserError):
    """A refused flag that asks for something."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Refusals:
    """Refused flags by their reason, so that a file with thirty flags of another trainer is answered in one line."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, refusal: Refused) -> None:
        """Note one refused flag."""
        self._names.setdefault(refusal.reason, []).append(refusal.name)

    def problems(self) -> list[str]:
        """Return one sentence for each reason."""
        return [f"{listed(names)}: {reason}" for reason, names in self._names.items()]


def is_off(value: Any) -> bool:
    """Return whether a value, from a command line or a file, is false, 0, none or empty."""
    return value is None or value == [] or value == {} or is_one_of(value, _OFF)


def is_one_of(value: Any, texts: Sequence[str]) -> bool:
    """Return whether a value is one of `texts`, in any case; numbers are compared as numbers, in quotes or not."""
    if isinstance(value, list | dict):
        return False
    text = str(value).strip().lower()
    number = _number(text)
    return any(text == each.lower() or (number is not None and number == _number(each)) for each in texts)


def _is_on(value: str) -> bool:
    number = _number(value)
    return value.lower() in _ON or (number is not None and number >= 1)


def _next_value(arguments: Sequence[str]) -> str | None:
    return arguments[0] if arguments and not arguments[0].startswith("--") else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _with_underscores(flag: str) -> str:
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
