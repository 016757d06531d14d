"""Measure the studio: its start, thumbnails, saves, and the page in Chromium, over a synthetic set.

    python benchmarks/studio_page.py [--num_images 10000]

Processor seconds stand beside those of the clock: on a busy machine the clock measures the others too, and the first
line of the table says how busy it was. The results go to benchmarks/results/studio_page.{json,txt}.
"""

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import psutil
from PIL import Image

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "0123456789abcdef-of-the-bench"
NUM_PATTERNS = 16
NUM_LARGE, NUM_SMALL = 200, 1000
NUM_SAVES = 50
NUM_BROWSER_REQUESTS = 6
PATIENCE = 300.0
PICTURES_IN_SIGHT = """() => {
  const box = document.getElementById("grid").getBoundingClientRect();
  const seen = [...document.querySelectorAll(".cell:not(.empty) img")].filter((image) => {
    const { top, bottom } = image.getBoundingClientRect();
    return !image.closest("[hidden]") && bottom > box.top && top < box.bottom;
  });
  return seen.length > 0 && seen.every((image) => image.src && image.complete && image.naturalWidth);
}"""
SCROLL = """async () => {
  const grid = document.getElementById("grid");
  let frames = 0;
  const start = performance.now();
  while (performance.now() - start < 4000) {
    grid.scrollTop += 40;
    frames += 1;
    await new Promise(requestAnimationFrame);
  }
  return [frames, performance.now() - start];
}"""


def write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write photographs of noise on gradients, few different ones under many names, with captions."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    width, height = size
    ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
    files = []
    for number in range(min(NUM_PATTERNS, count)):
        noise = random.normal(scale=12, size=(height, width, 3))
        file = folder / f"image {number:06}.jpg"
        Image.fromarray((np.roll(ramp, number * 40, axis=1) + noise + 20).clip(0, 255).astype(np.uint8)).save(file)
        files.append(file)
    words = [f"word{number}" for number in range(500)]
    for number in range(count):
        file = folder / f"image {number:06}.jpg"
        if number >= len(files):
            os.link(files[number % len(files)], file)
        chosen = random.choice(words, 20)
        file.with_suffix(".txt").write_text(", ".join(chosen), encoding="utf-8")
        file.with_suffix(".caption").write_text(f"A photograph of {' '.join(chosen)}.", encoding="utf-8")


class Client:
    """Asks the studio as its page does."""

    def __init__(self, port: int):
        self._port = port
        self._local = threading.local()

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Return status and body; connections stay open, one for each thread."""
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        sent = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            return self._answer(method, path, body, sent)
        except http.client.RemoteDisconnected:  # the server closes connections that rest
            self._local.connection.close()
            return self._answer(method, path, body, sent)

    def _answer(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
        self._local.connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._local.connection.getresponse()
        return answer.status, answer.read()

    def json(self, path: str) -> Any:
        """Return the answer to a question."""
        return json.loads(self.ask(path)[1])


@contextmanager
def served_with(arguments: Sequence[str], home: Path) -> Iterator[tuple[psutil.Process, int, float]]:
    """Run `python studio.py`; yield its process, the port, and when it was started."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "XDG_STATE_HOME": str(home / "state")}
    command = [sys.executable, str(ROOT / "studio.py"), *arguments, "--port=0", f"--token={TOKEN}"]
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = process.stdout.readline()
        port = int(link.split("127.0.0.1:")[1].split("/")[0])
        try:
            yield psutil.Process(process.pid), port, started
        finally:
            process.terminate()


def seconds_until(is_so: Callable[[], bool], started: float) -> float:
    """Return how long after `started` something is so."""
    while not is_so():
        if time.monotonic() - started > PATIENCE:
            raise TimeoutError("the studio did not get that far")
        time.sleep(0.01)
    return time.monotonic() - started


def processor_seconds(process: psutil.Process) -> float:
    """Return what a process has worked."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_start(process: psutil.Process, client: Client, started: float, count: int) -> dict[str, float]:
    """Return when the first page, the names and the counts are there, after the start of Python."""

    def answers() -> bool:
        try:
            return client.ask("/")[0] == 200
        except OSError:
            return False

    page = seconds_until(answers, started)
    page_processor = processor_seconds(process)
    seconds_until(lambda: sum(client.json("/api/set")["counts"]) == count, started)
    names = seconds_until(lambda: client.json("/api/view")["total"] == count, started)
    counts = seconds_until(lambda: client.json("/api/set")["progress"][0] >= count, started)
    loaded = seconds_until(lambda: bool(client.json("/api/set")["is_loaded"]), started)
    return {
        "first page, s": page,
        "first page, processor s": page_processor,
        "names, s": names,
        "captions counted, s": counts,
        "sizes and buckets too, s": loaded,
        "all of it, processor s": processor_seconds(process),
        "memory of the server, MB": process.memory_info().rss / 1e6,
    }


def measure_thumbnails(process: psutil.Process, client: Client, count: int) -> dict[str, float]:
    """Return how many new thumbnails a second come through as many connections as a browser opens."""
    ids = client.json("/api/view")["ids"][-count:]
    before, started = processor_seconds(process), time.monotonic()
    with ThreadPoolExecutor(NUM_BROWSER_REQUESTS) as pool:
        statuses = list(pool.map(lambda number: client.ask(f"/thumbnails/{number}")[0], ids))
    assert set(statuses) == {200}
    seconds, worked = time.monotonic() - started, processor_seconds(process) - before
    return {"a second": count / seconds, "processor ms each": 1000 * worked / count}


def measure_saves(client: Client, folder: Path) -> dict[str, float]:
    """Return how long a save takes, flushed to the disk, and how soon a change by another program is noticed."""
    number = client.json("/api/view")["ids"][0]
    seconds = []
    for count in range(NUM_SAVES):
        tag = client.json(f"/api/images/{number}")["captions"]["l"]["tag"]
        started = time.monotonic()
        path, body = f"/api/images/{number}/captions/l", {"variant": 0, "text": f"text {count}"}
        status, _ = client.ask(path, "PUT", body, if_match=tag)
        seconds.append(time.monotonic() - started)
        assert status == 200
    noticed = []
    for count in range(5):
        text = f"word{count}{os.getpid()}"
        (folder / "image 000001.txt").write_text(text, encoding="utf-8")
        started = time.monotonic()
        noticed.append(seconds_until(lambda text=text: _finds(client, text), started))  # type: ignore[misc]
    return {
        "save, median ms": 1000 * median(seconds),
        "save, slowest ms": 1000 * max(seconds),
        "change elsewhere noticed, slowest s": max(noticed),
    }


def _finds(client: Client, text: str) -> bool:
    return len(client.json(f"/api/view?query=l:{text}")["ids"]) == 1


def measure_page(port: int) -> dict[str, float]:
    """Return what the page takes in Chromium: until images are seen, while it scrolls, and of memory."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time of tasks, not the clock's

        def metrics() -> dict[str, float]:
            return {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}

        started = time.monotonic()
        page.goto(f"http://127.0.0.1:{port}/?token={TOKEN}")
        page.wait_for_function(PICTURES_IN_SIGHT)
        first = time.monotonic() - started
        started = time.monotonic()
        page.evaluate("document.getElementById('grid').scrollTop = 0.5 * document.getElementById('grid').scrollHeight")
        page.wait_for_function(PICTURES_IN_SIGHT)
        dragged = time.monotonic() - started
        before = metrics()["TaskDuration"]
        frames, milliseconds = page.evaluate(SCROLL)
        worked = metrics()["TaskDuration"] - before
        nodes = page.evaluate("document.querySelectorAll('*').length")
        renderers = [
            each.memory_full_info().uss
            for each in psutil.Process().children(recursive=True)
            if "--type=renderer" in each.cmdline()
        ]
        heap = metrics()["JSHeapUsedSize"]
        browser.close()
    return {
        "images seen after opening, s": first,
        "images complete after a drag, s": dragged,
        "processor ms a frame": 1000 * worked / frames,
        "frames a second": 1000 * frames / milliseconds,
        "DOM nodes": nodes,
        "page memory, MB": max(renderers) / 1e6,
        "JavaScript heap, MB": heap / 1e6,
    }


def measure(num_images: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return all figures."""
    small, large = folder / "small images", folder / "large images"
    write_images(small, num_images, (512, 512))
    write_images(large, NUM_LARGE, (2000, 1500))
    found: dict[str, dict[str, float]] = {}
    with served_with([str(small)], folder) as (process, port, started):
        client = Client(port)
        found["start"] = measure_start(process, client, started, num_images)
        found["page"] = measure_page(port)
        found["thumbnails of 512 x 512"] = measure_thumbnails(process, client, min(NUM_SMALL, num_images // 3))
        found["saves"] = measure_saves(client, small)
    with served_with([str(large)], folder) as (process, port, started):
        client = Client(port)
        measure_start(process, client, started, NUM_LARGE)
        found["thumbnails of 2000 x 1500"] = measure_thumbnails(process, client, NUM_LARGE)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--save", type=Path, default=RESULTS / "studio_page", help="result files without suffix")
    arguments = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="studio-bench-") as folder:
        found = measure(arguments.num_images, Path(folder))
    machine = ceilings.machine()
    lines = [
        machine_line(machine),
        f"{arguments.num_images} images; load of the machine {load:.1f} before and {os.getloadavg()[0]:.1f} after",
        *(f"{group:<26} {name:<38} {value:10.2f}" for group, rows in found.items() for name, value in rows.items()),
    ]
    table = "\n".join(lines)
    print(table)
    write_result(arguments.save, {"machine": machine, "load": load, "figures": found}, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
