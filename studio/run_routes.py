"""Routes of runs: the list, one run as it goes on, its curves, log, samples and report, and what it is asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from library.config.atomic_files import write_text
from library.config.errors import UserError
from library.config.file_names import name_problem
from library.runs.control import options_to_resume, save_now, state_to_resume, stop
from library.runs.curve_groups import ERROR_SUFFIX, charts_of
from library.runs.files import find_run, saved_files, span_of
from library.runs.folders import STARTING, FoundRun
from library.runs.launch import launch
from library.runs.log import read_log_end
from library.runs.watch import Pace, as_json
from library.samples.prompt_lines import prompt_line
from library.training.run_record import RECORD_FOLDER, RUNS
from studio.answers import Body, number
from studio.confinement import require_confined
from studio.runs import Runs

_MOST_POINTS = 4000
_LOG_LINES = 400
EDGE_OF_SAMPLES = 320
_EDGES = (160, EDGE_OF_SAMPLES, 640)
"""Sides of small versions of samples, in pixels."""
_REPORT_SIDE, _REPORT_COLUMNS = 256, 10
_MIB = 2**20


class RunRoutes:
    """Answers about runs."""

    def __init__(self, runs: Runs, *, has_set: bool):
        self._runs = runs
        self._has_set = has_set
        self._paces: dict[str, Pace] = {}

    # -- looking ---------------------------------------------------------------------------------------------------

    def list(self, request: Request, body: Body) -> Any:
        """All runs, the newest first."""
        found, problems = self._runs.folders.runs()
        allowed = [run for run in found if self._runs.may_read(run.output_dir)]
        roots = [str(root) for root in self._runs.folders.roots]
        short = [self._short(run) for run in allowed]
        return {"runs": short, "problems": problems, "roots": roots, "has_set": self._has_set}

    def run(self, request: Request, body: Body) -> Any:
        """One run: how far it is, what it was told, what it left, and what can be asked of it."""
        run = self._run(request)
        watch, notes = self._runs.watch(run)
        record = run.record
        names = watch.names()
        charts = [{"title": title, "names": chosen} for title, chosen in charts_of(names)]
        samples = self._runs.samples(run)
        steps = sorted({step for of in samples.values() for step in of})
        newest_first = (of[step] for step in reversed(steps) for of in samples.values() if step in of)
        self._runs.pictures.make_ahead(newest_first, EDGE_OF_SAMPLES)
        return {
            **self._short(run),
            "seed": None if record is None else record.seed,
            "options": run.launches[-1].options if record is None else record.options,
            "set": {} if record is None else record.set,
            "captions": {} if record is None else record.captions,
            "starts": [] if record is None else [{"time": each.time, "step": each.step} for each in record.starts],
            "ended": None if record is None or record.end is None else record.end.time,
            "marks": {**watch.marks(run), "samples": steps},
            "charts": charts,
            "errors": [name for name in names if name.endswith(ERROR_SUFFIX)],
            "notes": notes,
            "has_log": run.log_file is not None,
            "can_resume": state_to_resume(run) is not None,
            "num_samples": sum(map(len, samples.values())),
            "files": self._files(run),
        }

    def curves(self, request: Request, body: Body) -> Any:
        """Some curves of a run, from one step to another, thinned to what a screen shows."""
        watch, _ = self._runs.watch(self._run(request))
        asked = request.query_params
        first, last = (number(asked[name], name) if asked.get(name) else None for name in ("first", "last"))
        num_points = min(_MOST_POINTS, max(2, number(asked.get("points", "1000"), "points")))
        curves = {name: watch.curve(name, first, last, num_points) for name in asked.getlist("name")}
        return {"curves": {name: as_json(curve) for name, curve in curves.items() if curve is not None}}

    def log(self, request: Request, body: Body) -> Any:
        """The last lines that a run has printed, if it was started here."""
        file = self._run(request).log_file
        if file is None:
            raise UserError("the run was started elsewhere, and what it prints is not kept.")
        try:
            end = read_log_end(file, _LOG_LINES)
        except OSError as error:
            raise UserError(f"its log cannot be read: {error.strerror or error}.") from error
        return end._asdict()

    def samples(self, request: Request, body: Body) -> Any:
        """The samples of a run: a row for each prompt, and in it the id of an image by step; grids by step."""
        run = self._run(request)
        rows: Any = [
            {
                "index": prompt.index,
                "l": prompt.prompt_l,
                "g": prompt.prompt_g,
                "details": prompt.details,
                "is_average": prompt.is_average,
                "images": {step: self._runs.picture_id(run, path) for step, path in paths.items()},
            }
            for prompt, paths in self._runs.samples(run).items()
        ]
        return {
            "rows": rows,
            "steps": sorted({step for row in rows for step in row["images"]}),
            "grids": {step: self._runs.picture_id(run, path) for step, path in self._runs.grids(run).items()},
            "left_out": [] if run.record is None else self._runs.index(run).left_out(),
        }

    def about(self, request: Request, body: Body) -> Any:
        """How an image was drawn, and the line of a prompt file that draws it again."""
        run = self._run(request)
        path = self._runs.picture(run.id, request.path_params["picture"])
        texts = None if path is None else self._runs.index(run).texts(path)
        if path is None or texts is None:
            raise UserError("this image is gone, or cannot be read.")
        shown = {name: text for name, text in texts.items() if name not in ("parameters", "prompt", "workflow")}
        return {"name": path.name, "texts": shown, "line": prompt_line(texts)}

    async def picture(self, request: Request) -> Response:
        """An image of a run: as it is, or a small version."""
        of = request.path_params
        path = await run_in_threadpool(self._runs.picture, of["run"], of["picture"])
        if path is None:
            return Response(status_code=404)
        edge = request.query_params.get("edge", "")
        if edge in map(str, _EDGES):
            return await self._runs.pictures.answer(request, path, int(edge))
        return FileResponse(path, media_type="image/png", headers={"cache-control": "private, no-cache"})

    async def report(self, request: Request) -> Response:
        """The report that was made of a run, to be kept."""
        run = await run_in_threadpool(self._runs.folders.run, request.path_params["run"])
        page = None if run is None else _report_of(run)
        if page is None or not page.is_file() or not self._runs.may_read(page):
            return JSONResponse({"problem": "there is no report of this run yet."}, status_code=404)
        return FileResponse(page, media_type="text/html", filename=page.name)

    # -- asking ----------------------------------------------------------------------------------------------------

    def stop(self, request: Request, body: Body) -> Any:
        """Ask a run to save and end."""
        stop(self._writable(request))
        return {}

    def save(self, request: Request, body: Body) -> Any:
        """Ask a run for a model and a state; it goes on."""
        save_now(self._writable(request))
        return {}

    def resume(self, request: Request, body: Body) -> Any:
        """Start a run again from its last state, with the options that it had."""
        run = self._writable(request)
        options = options_to_resume(run)
        require_confined(options, self._runs)
        launch(run.output_dir, options)
        return {"id": run.id}

    def make_report(self, request: Request, body: Body) -> Any:
        """Write the report of a run beside its record."""
        from library.runs.report import report

        run = self._writable(request)
        if run.record is None:
            raise UserError("the run has not come to its first step: there is nothing to report.")
        watch, _ = self._runs.watch(run)
        found = find_run(run.output_dir, run.record, run.records, None, num_columns=_REPORT_COLUMNS)
        page = _report_of(run)
        write_text(page, report(replace(found, log_folder=watch.log_folder), _REPORT_SIDE))
        return {"name": page.name, "folder": str(page.parent)}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _run(self, request: Request) -> FoundRun:
        return self._runs.run(request.path_params["run"])

    def _writable(self, request: Request) -> FoundRun:
        run = self._run(request)
        self._runs.require_writable(run.output_dir, "the folder of this run")
        problem = None if run.output_name is None else name_problem(run.output_name)
        if problem is not None:  # files are written under names that begin or end with it
            raise UserError(f"the run's output name is '{run.output_name}': {problem}.", "Correct it in its record.")
        return run

    def _short(self, run: FoundRun) -> dict[str, Any]:
        state = run.state
        pace = self._pace(run, state)
        return {
            "id": run.id,
            "name": run.output_name or "",
            "record": run.name,
            "folder": str(run.output_dir),
            "state": state,
            "step": pace.step,
            "num_steps": pace.num_steps,
            "seconds_left": pace.seconds_left if state == RUNS else None,
            "started": run.launches[-1].start.time if run.record is None else run.record.started,
            "message": run.message,
        }

    def _pace(self, run: FoundRun, state: str) -> Pace:
        """Return where a run is; for one that has ended without saying where, its curves are read once."""
        if run.record is not None and run.record.end is not None:
            return Pace(run.record.end.step, run.record.set.get("steps"), None)
        if state in (RUNS, STARTING):
            self._paces.pop(run.id, None)
            return self._runs.watch(run)[0].pace(run)
        if run.id not in self._paces:
            self._paces[run.id] = self._runs.watch(run)[0].pace(run)
        return self._paces[run.id]

    def _files(self, run: FoundRun) -> Any:
        if run.record is None:
            return []
        paths = sorted(saved_files(run.output_dir, run.record, span_of(run.record, run.records)))
        return [{"name": path.name, "mib": _size(path) / _MIB} for path in paths]


def _report_of(run: FoundRun) -> Path:
    return run.output_dir / RECORD_FOLDER / f"{run.name}.html"


def _size(path: Path) -> int:
    try:
        return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size
    except OSError:  # replaced at this moment
        return 0
