"""The routes of the studio, in one table."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from studio.answers import answering
from studio.changing import Changing
from studio.looking import Looking
from studio.opened import Opened
from studio.pictures import LARGE, SMALL
from studio.watching import watch

if TYPE_CHECKING:
    from studio.runs import Runs

STATIC = Path(__file__).with_name("static")


def make_app(opened: Opened | None, runs: "Runs | None" = None) -> Starlette:
    """Return the application that shows and changes what is open. It is to be run behind a `Guard`."""
    routes: list[BaseRoute] = [Mount("/static", StaticFiles(directory=STATIC))]
    routes += [Route("/", RedirectResponse("/runs", 303))] if opened is None else routes_of_set(opened)
    if runs is not None:
        from studio.run_app import routes_of_runs

        routes += routes_of_runs(runs, has_set=opened is not None)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if runs is not None:
                runs.start()
                stack.callback(runs.close)
            if opened is not None:
                await stack.enter_async_context(_watched(opened))
            yield

    return Starlette(routes=routes, lifespan=lifespan)


@contextlib.asynccontextmanager
async def _watched(opened: Opened) -> AsyncIterator[None]:
    """Within the block the set is read and watched."""
    stop = asyncio.Event()
    opened.start()
    watching = asyncio.create_task(watch(opened, stop))
    yield
    stop.set()
    opened.close()
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


def routes_of_set(opened: Opened) -> list[BaseRoute]:
    """Return the routes of a set of images."""
    looking, changing = Looking(opened), Changing(opened)

    def picture(edge: int):  # type: ignore[no-untyped-def]
        async def answer(request: Request) -> Response:
            numbered = [each for each in [request.path_params["number"]] if each.isdecimal()]
            members = [opened.captions.find(int(each)) for each in numbered]
            if not members or members[0] is None:
                return Response(status_code=404)
            return await opened.pictures.answer(request, members[0].image, edge)

        return answer

    return [
        Route("/", _page, methods=["GET"]),
        Route("/api/set", answering(looking.set), methods=["GET"]),
        Route("/api/view", answering(looking.view), methods=["GET"]),
        Route("/api/tags", answering(looking.tags), methods=["GET"]),
        Route("/api/images/{number}", answering(looking.image), methods=["GET"]),
        Route("/api/images/{number}/draws", answering(looking.draws), methods=["GET"]),
        Route("/api/images/{number}/captions/{encoder}", answering(changing.caption), methods=["PUT"]),
        Route("/api/count", answering(looking.count), methods=["POST"]),
        Route("/api/edits/preview", answering(changing.preview), methods=["POST"]),
        Route("/api/edits/apply", answering(changing.apply), methods=["POST"]),
        Route("/api/machine", answering(changing.caption_by_machine), methods=["POST"]),
        Route("/api/machine/cancel", answering(changing.cancel_machine), methods=["POST"]),
        Route("/api/undo", answering(changing.undo), methods=["POST"]),
        Route("/api/redo", answering(changing.redo), methods=["POST"]),
        Route("/api/events", opened.hub.stream, methods=["GET"]),
        Route("/thumbnails/{number}", picture(SMALL), methods=["GET"]),
        Route("/pictures/{number}", picture(LARGE), methods=["GET"]),
    ]


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-store"})
