"""Thumbnails and large views of images, made by threads."""

import asyncio
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from library.config.errors import UserError
from library.images.thumbnails import remove_old_thumbnails, thumbnail, thumbnail_name

log = logging.getLogger(__name__)

SMALL, LARGE = 256, 1600
"""Longest sides in the grid and in the editor, in pixels."""
_NICENESS = 19
_FOR_EVER = "private, max-age=31536000, immutable"


class Pictures:
    """Makes thumbnails in as many threads as there are processors; a request that nobody waits for is forgotten.

    `newest_first`: what was asked for last is made first, for a page that is scrolled. Otherwise requests are answered
    in their order, for a page that asks for what is urgent first.
    """

    def __init__(self, folder: Path, *, newest_first: bool = True):
        self._folder = folder
        self._next = -1 if newest_first else 0
        self._waiting: list[tuple[Future[bytes], Callable[[], bytes]]] = []
        lock = threading.RLock()
        self._has_work, self._has_none = threading.Condition(lock), threading.Condition(lock)
        self._is_closed = False
        self._ahead: deque[tuple[Path, int]] = deque()
        self._known_ahead: set[tuple[Path, int]] = set()
        self._makes_ahead = False
        for _ in range(os.cpu_count() or 1):
            threading.Thread(target=self._work, name="thumbnails", daemon=True).start()

    def request(self, image: Path, edge: int) -> "Future[bytes]":
        """Return the JPEG of an image that a thread is to make."""
        future: Future[bytes] = Future()
        with self._has_work:
            self._waiting.append((future, lambda: thumbnail(image, edge, self._folder)))
            self._has_work.notify()
        return future

    def make_ahead(self, images: Iterable[Path], edge: int) -> None:
        """Have thumbnails made that will be asked for, the most likely first, while no request waits.

        One thread of the lowest priority makes them. Those that came later are made first.
        """
        with self._has_work:
            new = [(image, edge) for image in images if (image, edge) not in self._known_ahead]
            self._known_ahead.update(new)
            self._ahead.extendleft(reversed(new))
            if new and not self._makes_ahead:
                self._makes_ahead = True
                threading.Thread(target=self._work_ahead, name="thumbnails ahead", daemon=True).start()

    def _work_ahead(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority that any may lower
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._has_work:
                self._has_none.wait_for(lambda: self._is_closed or not self._waiting)
                if self._is_closed or not self._ahead:
                    self._makes_ahead = False
                    return
                image, edge = self._ahead.popleft()
            try:
                thumbnail(image, edge, self._folder)
            except UserError as error:  # told to the page that asks for it
                log.debug("%s", error)

    def tidy(self) -> None:
        """Remove old thumbnails if they have become too many."""
        remove_old_thumbnails(self._folder)

    def close(self) -> None:
        """End the threads."""
        with self._has_work:
            self._is_closed = True
            self._has_work.notify_all()
            self._has_none.notify_all()

    def _work(self) -> None:
        while True:
            with self._has_work:
                while not self._waiting and not self._is_closed:
                    self._has_work.wait()
                if self._is_closed:
                    return
                future, make = self._waiting.pop(self._next)
                if not self._waiting:
                    self._has_none.notify()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(make())
            except UserError as error:
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001  # whoever waits for it must not wait for ever
                future.set_exception(error)

    async def answer(self, request: Request, image: Path, edge: int) -> Response:
        """Return the picture as the answer to a request; the page asks again only when the file has changed."""
        tag = f'"{Path(thumbnail_name(image, edge)).stem}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        future = self.request(image, edge)
        made = asyncio.wrap_future(future)
        left = asyncio.create_task(_left(request))
        waiting: list[asyncio.Future[Any]] = [made, left]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not made.done():
            made.cancel()  # which cancels the future that it wraps
            return Response(status_code=499)
        try:
            content = made.result()
        except UserError as error:
            return Response(str(error), status_code=404, media_type="text/plain")
        caching = _FOR_EVER if request.query_params.get("v") else "private, no-cache"
        return Response(content, media_type="image/jpeg", headers={"cache-control": caching, "etag": tag})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
