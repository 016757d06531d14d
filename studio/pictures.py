"""Thumbnails and large views of images, made by threads."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from library.config.errors import UserError
from library.data.thumbnails import remove_old_thumbnails, thumbnail, thumbnail_name

SMALL, LARGE = 256, 1600
"""Longest sides in the grid and in the editor, in pixels."""
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
        self._has_work = threading.Condition()
        self._is_closed = False
        for _ in range(os.cpu_count() or 1):
            threading.Thread(target=self._work, name="thumbnails", daemon=True).start()

    def request(self, image: Path, edge: int) -> "Future[bytes]":
        """Return the JPEG of an image that a thread is to make."""
        future: Future[bytes] = Future()
        with self._has_work:
            self._waiting.append((future, lambda: thumbnail(image, edge, self._folder)))
            self._has_work.notify()
        return future

    def tidy(self) -> None:
        """Remove old thumbnails if they have become too many."""
        remove_old_thumbnails(self._folder)

    def close(self) -> None:
        """End the threads."""
        with self._has_work:
            self._is_closed = True
            self._has_work.notify_all()

    def _work(self) -> None:
        while True:
            with self._has_work:
                while not self._waiting and not self._is_closed:
                    self._has_work.wait()
                if self._is_closed:
                    return
                future, make = self._waiting.pop(self._next)
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
