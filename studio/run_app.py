"""The routes of runs, in one table."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from studio.answers import answering
from studio.command_routes import CommandRoutes
from studio.run_routes import RunRoutes
from studio.runs import Runs

_PAGE = Path(__file__).with_name("static") / "runs.html"


def routes_of_runs(runs: Runs, *, has_set: bool) -> list[BaseRoute]:
    """Return the routes of runs; `has_set` says whether there is a page of images beside them."""
    of_runs, commands = RunRoutes(runs, has_set=has_set), CommandRoutes(runs)
    runs.closing.append(commands.close)

    async def page(request: Request) -> Response:
        return FileResponse(_PAGE, headers={"cache-control": "no-store"})

    return [
        Route("/runs", page, methods=["GET"]),
        Route("/api/runs", answering(of_runs.list), methods=["GET"]),
        Route("/api/runs/{run}", answering(of_runs.run), methods=["GET"]),
        Route("/api/runs/{run}/curves", answering(of_runs.curves), methods=["GET"]),
        Route("/api/runs/{run}/log", answering(of_runs.log), methods=["GET"]),
        Route("/api/runs/{run}/samples", answering(of_runs.samples), methods=["GET"]),
        Route("/api/runs/{run}/samples/{picture}", answering(of_runs.about), methods=["GET"]),
        Route("/api/runs/{run}/stop", answering(of_runs.stop), methods=["POST"]),
        Route("/api/runs/{run}/save", answering(of_runs.save), methods=["POST"]),
        Route("/api/runs/{run}/resume", answering(of_runs.resume), methods=["POST"]),
        Route("/api/runs/{run}/report", answering(of_runs.make_report), methods=["POST"]),
        Route("/api/runs/{run}/command", answering(commands.of_run), methods=["GET"]),
        Route("/api/commands/form", answering(commands.form), methods=["GET"]),
        Route("/api/commands/preset", answering(commands.preset), methods=["GET"]),
        Route("/api/commands/check", answering(commands.check), methods=["POST"]),
        Route("/api/commands/summary", answering(commands.summary), methods=["POST"]),
        Route("/api/commands/start", answering(commands.start), methods=["POST"]),
        Route("/runs/{run}/report", of_runs.report, methods=["GET"]),
        Route("/runs/{run}/samples/{picture}", of_runs.picture, methods=["GET"]),
    ]
