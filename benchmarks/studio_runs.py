"""Measure the studio's page of runs in Chromium: samples opened and stepped through, a million points, watching.

    python benchmarks/studio_runs.py [--num_steps 200] [--num_prompts 8] [--side 1024]

The samples are written for it, few different pixels under many names and texts. The results go to
benchmarks/results/studio_runs.{json,txt}; the first lines say how busy the machine was.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import psutil
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from benchmarks.studio_page import TOKEN, served_with
from library.samples.picture_files import SAMPLE_FOLDER
from library.samples.prompts import SamplePrompt
from tests.studio.written_runs import BEGAN, scalar, write_run, write_samples

NUM_PATTERNS = 8
NUM_POINTS = 1_000_000
SECONDS_WATCHED = 15
HEADER_BYTES = 33  # of a PNG: its signature and size
ALL_DRAWN = "() => document.querySelectorAll('.sample canvas').length && !document.querySelector('.waiting')"
STEP_THROUGH = """async (count) => {
  const frame = () => new Promise(requestAnimationFrame);
  let waited = 0;
  const start = performance.now();
  for (let step = 0; step < count; step += 1) {
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
    await frame();
    while (document.querySelector(".waiting")) { waited += 1; await frame(); }
  }
  return [count / ((performance.now() - start) / 1000), waited];
}"""


def write_large_samples(folder: Path, num_steps: int, num_prompts: int, side: int) -> None:
    """Write a run with samples of `side` pixels: noise on gradients, with the texts of each."""
    prompts = [SamplePrompt(f"subject {number}", "style", line=number + 1) for number in range(num_prompts)]
    write_run(folder, "m", num_steps=num_steps, sample_steps=[])
    write_samples(folder, "m", range(num_steps), prompts, side=8)
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side)[None, :, None] * np.ones((side, 1, 3))
    bodies = []
    for number in range(NUM_PATTERNS):
        pixels = (np.roll(ramp, number * 90, axis=1) + random.normal(scale=6, size=(side, side, 3)) + 20).clip(0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        bodies.append(file.getvalue())
    for number, path in enumerate(sorted((folder / SAMPLE_FOLDER).glob("*.png"))):
        small, large = path.read_bytes(), bodies[number % NUM_PATTERNS]
        texts = small[HEADER_BYTES : small.index(b"IDAT") - 4]
        path.write_bytes(large[:HEADER_BYTES] + texts + large[HEADER_BYTES:])


def write_points(folder: Path) -> None:
    """Write a run with a curve of a million points."""
    record = write_run(folder, "long", num_steps=2, sample_steps=[], began=BEGAN + timedelta(hours=1))
    with (Path(str(record.log_folder)) / "more.tfevents").open("wb") as log:
        log.writelines(scalar("loss/current", step, step % 1000) for step in range(3, NUM_POINTS + 1))


def measure_samples(page: Page, link: str, num_steps: int) -> dict[str, float]:
    """Return how long samples take to be seen for the first time and again, and how fast steps follow each other."""
    found = {}
    for name in ("first time", "again"):
        page.goto(link)
        page.locator(".run-item button", has_text="m").last.click()
        page.locator(".chart").first.wait_for()
        started = time.monotonic()
        page.get_by_role("tab", name="Samples").click()
        page.wait_for_function(ALL_DRAWN)
        found[f"samples seen, {name}, s"] = time.monotonic() - started
        if name == "first time":
            rate, waited = page.evaluate(STEP_THROUGH, min(60, num_steps - 1))
            found["steps a second, thumbnails being made"] = rate
            started = time.monotonic()
            page.wait_for_load_state("networkidle", timeout=600_000)
            found["all thumbnails made after, s"] = time.monotonic() - started
    page.wait_for_load_state("networkidle", timeout=600_000)
    rate, waited = page.evaluate(STEP_THROUGH, min(150, num_steps - 1))
    return {**found, "steps a second, thumbnails made": rate, "frames that waited for images": waited}


def measure_curves(page: Page, link: str) -> dict[str, float]:
    """Return how long a million points take to be seen."""
    page.goto(link)
    page.locator(".run-item").first.wait_for()
    started = time.monotonic()
    page.locator(".run-item button", has_text="long").click()
    page.locator(".chart .legend", has_text="loss/current").wait_for()
    return {"curve of a million points seen, s": time.monotonic() - started}


def measure_watching(page: Page, process: psutil.Process) -> dict[str, float]:
    """Return what the studio takes of a processor while a page watches a run."""
    before = sum(process.cpu_times()[:2])
    page.wait_for_timeout(SECONDS_WATCHED * 1000)
    return {"processor while watched, % of one": (sum(process.cpu_times()[:2]) - before) / SECONDS_WATCHED * 100}


def measure(folder: Path, num_steps: int, num_prompts: int, side: int) -> dict[str, dict[str, float]]:
    """Return all figures."""
    runs = folder / "runs"
    write_large_samples(runs / "samples", num_steps, num_prompts, side)
    write_points(runs / "points")
    write_run(runs / "live", "live", num_steps=1000, sample_steps=[0], began=BEGAN + timedelta(hours=2), has_end=False)
    found: dict[str, dict[str, float]] = {}
    with served_with(["--run_dirs", str(runs)], folder) as (process, port, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(120_000)
        link = f"http://127.0.0.1:{port}/runs?token={TOKEN}"
        page.goto(link)
        page.locator(".run-item").first.wait_for()
        found["curves"] = measure_curves(page, link)
        page.goto(link)
        page.locator(".run-item button", has_text="live").click()
        page.locator(".chart").first.wait_for()
        found["watching"] = measure_watching(page, process)
        found["samples"] = measure_samples(page, link, num_steps)
        browser.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=200)
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--save", type=Path, default=RESULTS / "studio_runs", help="result files without suffix")
    arguments = parser.parse_args(argv)
    load = os.getloadavg()[0]
    sizes = arguments.num_steps, arguments.num_prompts, arguments.side
    with tempfile.TemporaryDirectory(prefix="studio-bench-") as folder:
        found = measure(Path(folder), *sizes)
    machine: dict[str, Any] = ceilings.machine()
    lines = [
        machine_line(machine),
        f"{sizes[0]} steps x {sizes[1]} samples of {sizes[2]} pixels; load of the machine {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after",
        *(f"{group:<10} {name:<44} {value:10.2f}" for group, rows in found.items() for name, value in rows.items()),
    ]
    table = "\n".join(lines)
    print(table)
    write_result(arguments.save, {"machine": machine, "load": load, "figures": found}, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
