"""Functions that run in a process beside the server: what they import, and how long they take, stays there."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from library.config.errors import UserError


class Worker:
    """A process that is started when it is first needed, and again if it is lost."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float, **named: Any) -> Any:
        """Return what `function` returns. Raise `UserError` as it does, and if it takes longer than `seconds`."""
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            pool = self._pool
        try:
            problem, result = pool.submit(_answered, function, arguments, named).result(seconds)
        except (BrokenProcessPool, TimeoutError) as error:
            self.close()
            raise UserError(
                "the process that works for this page has ended, or takes too long.", "Try again."
            ) from error
        if problem is not None:
            raise UserError(problem)
        return result

    def close(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            for process in list(getattr(pool, "_processes", {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _answered(function: Callable[..., Any], arguments: Any, named: Any) -> tuple[str | None, Any]:
    """Return the problem, or the result: errors do not survive the way from one process to another."""
    try:
        return None, function(*arguments, **named)
    except UserError as error:
        return str(error), None
