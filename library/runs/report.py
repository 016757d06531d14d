"""A run as one page that needs nothing beside it: options, set, curves, samples, what each encoder is worth, files."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from library.runs.curve_groups import ERROR_SUFFIX, charts_of
from library.runs.curves import read_curves
from library.runs.files import RunFiles
from library.runs.report_charts import chart
from library.samples.contact_sheet import row_labels, steps_of
from library.sdxl.thumbnail import jpeg_url
from library.training.run_record import RunRecord
from library.training.saves import step_of
from library.training.validation_log import read_validations

_NO_PLACES = frozenset({"config_file", "output_config"})
_QUALITY = 88  # of the JPEGs
_LARGEST_GRID = 1400  # of the longer side, in pixels
_GIB, _MIB = 2**30, 2**20

_STYLE = """
:root { color-scheme: light dark; --paper: #f5f6f8; --card: #fff; --line: #dfe3ea; --ink: #1d2430; --soft: #5a6576; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1d2229; --line: #333b46; --ink: #e4e8ee; --soft: #9aa5b5; } }
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } .note { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1rem; }
.chart svg { width: 100%; height: auto; } .chart polyline { fill: none; stroke-width: 1.6; }
.chart text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; } figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .82rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } code, pre { font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
.samples th { font-weight: normal; white-space: pre-wrap; min-width: 13em; max-width: 20em; }
.samples img, .sliding img { display: block; border-radius: 4px; }
.sliding { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; } .sliding figure { margin: 0; max-width: 20rem; }
.sliding figcaption { font-weight: normal; font-size: .8rem; white-space: pre-wrap; color: var(--soft); }
input[type=range] { width: min(100%, 32rem); } .whole { max-width: 100%; height: auto; border-radius: 4px; }
"""

_SCRIPT = """
const slider = document.getElementById("step");
if (slider) {
  const steps = JSON.parse(slider.dataset.steps), shown = document.getElementById("shown-step");
  const show = () => {
    shown.textContent = steps[slider.value];
    for (const image of document.querySelectorAll(".sliding img")) {
      const cell = document.getElementById(`${image.dataset.row}-${steps[slider.value]}`);
      image.style.visibility = cell ? "visible" : "hidden";
      if (cell) image.src = cell.src;
    }
  };
  slider.addEventListener("input", show);
  show();
}
"""


def report(run: RunFiles, image_side: int) -> str:
    """Return the page as HTML; all that comes from files is escaped, images are embedded with sides of `image_side`."""
    record = run.record
    name = record.output_name or "a run without a name"
    body = "\n".join([*_head(record, name), *_curves(run), *_samples(run, image_side), *_grids(run), *_worth(run)])
    rest = "\n".join([*_set(record), *_options(record), *_files(run)])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n{rest}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _head(record: RunRecord, name: str) -> Iterator[str]:
    last_step = record.end.step if record.end is not None else None
    steps = record.set.get("steps")
    done = f"{steps} steps" if last_step in (None, steps) else f"{last_step} of {steps} steps"
    times = [f"began {record.started.replace('T', ' ')}"]
    times += [f"resumed {start.time.replace('T', ' ')} at step {start.step}" for start in record.starts[1:]]
    times += [] if record.end is None else [f"{record.end.outcome} {record.end.time.replace('T', ' ')}"]
    yield f"<h1>{escape(name)}</h1>"
    yield f'<p class="note">{escape(record.state)}: {done}, seed {record.seed}; {escape("; ".join(times))}</p>'
    if record.end is not None and record.end.message:
        yield f'<p class="card">{escape(record.end.message)}</p>'


# -- curves -----------------------------------------------------------------------------------------------------------


def _curves(run: RunFiles) -> Iterator[str]:
    if run.log_folder is None:
        yield '<h2>Curves</h2><p class="note">This run has none: --logging_dir writes them.</p>'
        return
    curves = read_curves(run.log_folder) if run.log_folder.is_dir() else {}
    if not curves:
        yield f"<h2>Curves</h2><p class=\"note\">'{escape(str(run.log_folder))}' holds none.</p>"
        return
    marks = {
        "samples": steps_of(run.samples),
        "saved": sorted({step for path in run.files if (step := step_of(path.name)) is not None}),
    }
    yield '<h2>Curves</h2><div class="charts">'
    for title, chosen in charts_of(curves):
        errors = {name: curves[name + ERROR_SUFFIX] for name in chosen if name + ERROR_SUFFIX in curves}
        yield chart(title, {name: curves[name] for name in chosen}, errors, marks)
    yield "</div>"


# -- images -----------------------------------------------------------------------------------------------------------


def _samples(run: RunFiles, side: int) -> Iterator[str]:
    if not run.samples:
        return
    steps, labels = steps_of(run.samples), row_labels(list(run.samples))
    yield "<h2>Samples</h2>"
    yield (
        f'<p><label>step <output id="shown-step">{steps[-1]}</output><br><input type="range" id="step" min="0" '
        f'max="{len(steps) - 1}" value="{len(steps) - 1}" data-steps="{escape(json.dumps(steps))}"></label></p>'
    )
    figures = (
        f'<figure><img data-row="s{row}" alt=""><figcaption>{escape(label)}</figcaption></figure>'
        for row, label in enumerate(labels)
    )
    yield f'<div class="sliding">{"".join(figures)}</div>'
    head = "".join(f"<th>step {step}</th>" for step in steps)
    yield f'<div class="scroll"><table class="samples"><thead><tr><th></th>{head}</tr></thead><tbody>'
    for row, (label, paths) in enumerate(zip(labels, run.samples.values(), strict=True)):
        cells = "".join(_cell(f"s{row}-{step}", paths.get(step), side) for step in steps)
        yield f"<tr><th>{escape(label)}</th>{cells}</tr>"
    yield "</tbody></table></div>"


def _cell(name: str, path: Path | None, side: int) -> str:
    address = None if path is None else _embedded(path, side)
    return "<td></td>" if address is None else f'<td><img id="{name}" src="{address}" alt=""></td>'


def _grids(run: RunFiles) -> Iterator[str]:
    if not run.grids:
        return
    yield "<h2>Each L prompt with each G prompt</h2>"
    for step in sorted({min(run.grids), max(run.grids)}):
        address = _embedded(run.grids[step], _LARGEST_GRID)
        if address is not None:
            yield f'<p>step {step}</p><img class="whole" src="{address}" alt="grid of samples at step {step}">'


def _embedded(path: Path, side: int) -> str | None:
    """Return an image as the address of itself, None for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            reduced = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # how Pillow answers damage; `find_samples` has named the file
        return None
    reduced.thumbnail((side, side))
    return jpeg_url(reduced, _QUALITY)


# -- tables -----------------------------------------------------------------------------------------------------------


def _worth(run: RunFiles) -> Iterator[str]:
    lines = [] if run.log_folder is None else read_validations(run.log_folder)
    last = {line["name"]: line for line in lines}
    for name, line in last.items():
        yield f"<h2>{escape(name.capitalize())} at step {line['step']}</h2>"
        rows = [(condition, _number(loss), "") for condition, loss in line["losses"].items()]
        rows += [
            (f"worth of {each}", _number(found["mean"]), f"± {_number(found['standard_error'])}")
            for each, found in line["worth"].items()
            if "/" not in each
        ]
        yield _table(rows)


def _set(record: RunRecord) -> Iterator[str]:
    yield "<h2>The set</h2>"
    rows = [(name.replace("_", " "), str(count), "") for name, count in record.set.items()]
    yield _table([*rows, *((f"captions {encoder.upper()}", source, "") for encoder, source in record.captions.items())])


def _options(record: RunRecord) -> Iterator[str]:
    options = {name: value for name, value in record.options.items() if name not in _NO_PLACES}
    yield "<h2>Options that differ from their defaults</h2>"
    yield _table([(f"--{name}", _text(value), "") for name, value in options.items()])


def _files(run: RunFiles) -> Iterator[str]:
    yield "<h2>Files</h2>"
    yield _table([(path.name, _size(path), "") for path in run.files] or [("none", "", "")])


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    cells = (
        f'<tr><th>{escape(name)}</th><td>{escape(value)}</td><td class="note">{escape(more)}</td></tr>'
        for name, value, more in rows
    )
    return f'<div class="card scroll"><table>{"".join(cells)}</table></div>'


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _size(path: Path) -> str:
    num_bytes = sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.1f} MiB"
