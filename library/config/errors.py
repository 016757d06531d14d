"""The one exception for a mistake that the user can fix, and how a script ends on it."""

import functools
import io
import sys
from collections.abc import Sequence
from typing import Protocol

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can fix: `problem` says what is wrong and where, `remedy` how to mend it."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy


class Main(Protocol):
    """The entry point of a script: arguments (None: those of the process) to exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def exits_on_user_error(main: Main) -> Main:
    """`main` without tracebacks: a `UserError` is printed as "error: ...", exit status 2; after Ctrl-C it is 130."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _print_any_character()
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted; what was being written is as it was before", file=sys.stderr)
            return EXIT_INTERRUPTED

    return guarded


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return the names as a list in a sentence: "a, b and 3 more"."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _print_any_character() -> None:
    """Let names in scripts that the console cannot show (a Windows pipe) come out escaped instead of as a crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
