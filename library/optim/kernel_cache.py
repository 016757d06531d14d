"""The folder in which torch keeps compiled kernels: a file that a killed process left unfinished is made again."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = re.compile(r"(?P<path>(?:[A-Za-z]:)?[/\\][^\n:]*\.(?:so|pyd|dll|dylib))\b")


def with_whole_kernels(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which compiles; a kernel on disk that cannot be loaded is removed and compiled again.

    torch waits for the lock of a kernel before it loads the file, so that an unfinished one has no writer any more.
    """

    def run(*arguments: P.args, **named: P.kwargs) -> R:
        while True:
            try:
                return function(*arguments, **named)
            except (torch._dynamo.exc.BackendCompilerFailed, ImportError, OSError) as error:
                if not _removed_what_is_damaged(error):
                    raise

    return run


def _removed_what_is_damaged(error: BaseException) -> bool:
    """Remove the kernels in torch's folder that `error` names; return whether there were any."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()).resolve()
    named = {Path(path).resolve() for path in _paths_in(error) if _may_exist(path)}
    damaged = [path for path in named if path.is_relative_to(folder) and path.is_file()]
    for path in damaged:
        path.unlink()
        log.warning("the compiled kernel '%s' was damaged, as a killed process leaves it; it is compiled again", path)
    return bool(damaged)


def _may_exist(path: str) -> bool:
    """Return whether this is the name of a file: what begins with a slash may be the whole command of a compiler."""
    try:
        return Path(path).is_file()
    except OSError:  # longer than a name can be
        return False


def _paths_in(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield from (found["path"] for found in _LIBRARY.finditer(str(error)))
        error = error.__cause__ or error.__context__
