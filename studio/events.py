"""What open pages are told: changes of captions, by whom, and how far reading is."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

_MOST_WAITING = 200
_HEARTBEAT_SECONDS = 15.0
_END: dict[str, Any] = {}


class Hub:
    """Hands messages to every open page; threads may publish."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pages: set[asyncio.Queue[dict[str, Any]]] = set()

    def start(self) -> None:
        """Take the loop that runs now as the one of all pages."""
        self._loop = asyncio.get_running_loop()

    def publish(self, kind: str, **facts: Any) -> None:
        """Tell every page."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, {"kind": kind, **facts})

    def _hand_out(self, message: dict[str, Any]) -> None:
        for queue in self._pages:
            if queue.qsize() < _MOST_WAITING:
                queue.put_nowait(message)

    def close(self) -> None:
        """End what every page listens to."""
        for queue in self._pages:
            queue.put_nowait(_END)

    async def stream(self, request: Request) -> StreamingResponse:
        """Answer with what happens from now on, as server-sent events."""
        return StreamingResponse(
            self._messages(request), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _messages(self, request: Request) -> AsyncIterator[str]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._pages.add(queue)
        try:
            yield "retry: 1000\n\n"
            while not await request.is_disconnected():
                try:
                    message = await asyncio.wait_for(queue.get(), _HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if message is _END:
                    return
                yield f"data: {json.dumps(message)}\n\n"
        finally:
            self._pages.discard(queue)
