"""Functions that run in a process beside the server: what they import, and how long they take, stays there."""

import logging
import multiprocessing
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from library.config.errors import UserError
from studio.answers import UNFORESEEN

log = logging.getLogger(__name__)


class Worker:
    """A process that is started when it is first needed, and again if it is lost.

    Of several calls that wait for it only the newest is made: the others are of a page that has changed since.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: Future[Any] | None = None
        self._lock = threading.Lock()

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float, **named: Any) -> Any:
        """Return what `function` returns. Raise `UserError` as it does, if it takes too long, and if it is not made."""
        try:
            problem, result, unforeseen = self._submitted(function, arguments, named).result(seconds)
        except CancelledError as error:
            raise UserError("another request has taken the place of this one.", "Try again.") from error
        except (BrokenProcessPool, TimeoutError) as error:
            self.close()
            raise UserError(
                "the process that works for this page has ended, or takes too long.", "Try again."
            ) from error
        if unforeseen is not None:
            log.error("%s", unforeseen)
            raise UserError(f"this failed in a way that nobody foresaw: {problem}", UNFORESEEN)
        if problem is not None:
            raise UserError(problem)
        return result

    def _submitted(self, function: Callable[..., Any], arguments: Any, named: Any) -> Future[Any]:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            if self._waiting is not None:
                self._waiting.cancel()
            self._waiting = self._pool.submit(_answered, function, arguments, named)
            return self._waiting

    def close(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            for process in list(getattr(pool, "_processes", {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _answered(function: Callable[..., Any], arguments: Any, named: Any) -> tuple[str | None, Any, str | None]:
    """Return problem, result, and the traceback of what nobody foresaw: errors do not survive the way to the server."""
    try:
        return None, function(*arguments, **named), None
    except UserError as error:
        return str(error), None, None
    except Exception as error:  # noqa: BLE001  # raised again in the server, as what the page shows
        return f"{type(error).__name__}: {error}", None, traceback.format_exc()
