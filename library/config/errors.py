"""The one exception for a mistake that the user can fix, and how a script ends on it."""

import difflib
import functools
import io
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from library.config.messages import start_logging

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_MOST_LINES = 10
_LEAST_LIKENESS = 0.75
"""Of a misspelt name to the one that is meant: one or two letters, not a name that merely shares some."""

log = logging.getLogger(__name__)


class UserError(Exception):
    """A mistake that the user can fix: `problem` says what is wrong and where, `remedy` how to fix it."""

    exit_status = EXIT_USER_ERROR
    is_shared = False
    """Whether every process of a run raises it, so that one of them is enough to say it."""
    problems: Sequence[str] = ()
    """Each of several problems that were found together, a sentence each."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy

    def add_remedy(self, more: str) -> None:
        """Say `more` at the end."""
        self.remedy = f"{self.remedy} {more}".strip()
        self.args = (f"{self.problem} {self.remedy}",)


class Main(Protocol):
    """The entry point of a script: arguments (None: those of the process) to exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exits_on_user_error(main: Main) -> Main:
    """Wrap `main`: messages go to the console, each error becomes one line.

    The status is 2 after a `UserError`, 1 after what the user has no part in, 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _print_any_character()
        start_logging()
        try:
            return main(argv)
        except UserError as error:
            log.error("error: %s", error, extra={"is_shared": error.is_shared})
            return error.exit_status
        except KeyboardInterrupt:
            log.warning("interrupted; files that were being written are unchanged")
            return EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001 (the one guard around every script)
            from library.config.unforeseen import explained  # which imports this module

            failure = explained(error)
            log.error("error: %s", failure, extra={"is_shared": failure.is_shared})
            return failure.exit_status

    return guarded


def error_of_problems(problems: Sequence[str]) -> UserError:
    """Return one error that lists every problem, one on each line."""
    many = "\n  ".join([f"{len(problems)} problems with the options:", *problems])
    error = UserError(problems[0] if len(problems) == 1 else many)
    error.problems = tuple(problems)
    return error


def error_of_errors(what: str, errors: Sequence[UserError]) -> UserError:
    """Return one error for several: their number, `what` they are about, and ten of them at most, one on each line."""
    if len(errors) == 1:
        return errors[0]
    more = [f"and {len(errors) - _MOST_LINES} more"] if len(errors) > _MOST_LINES else []
    return UserError("\n  ".join([f"{len(errors)} {what}:", *map(str, errors[:_MOST_LINES]), *more]))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the sentence "Did you mean ...?" with the closest of `names`, or "" if none is close."""
    by_word = {each.lstrip("-"): each for each in names}
    word = name.lstrip("-")
    matches = [each for each in by_word if word and each.startswith(word)]
    matches = matches or difflib.get_close_matches(word, by_word, n=1, cutoff=_LEAST_LIKENESS)
    return f"Did you mean {by_word[matches[0]]}?" if matches else ""


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return the names as a list in a sentence: "a, b and 3 more"."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without its full stop; the name of its class if it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _print_any_character() -> None:
    """Print characters that the console cannot show (a Windows pipe) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
