"""A studio that runs in this process, as `python studio.py` runs it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from library.config.options import parse_options
from studio.command import runs_of
from studio.opened import Opened
from studio.options import OPTION_CLASSES, subsets_of
from studio.runs import Runs
from studio.serving import listening_socket, make_server

TOKEN = "0123456789abcdef0123"
PATIENCE = 20.0


@dataclass
class Studio:
    """A running studio, and a client that has its token."""

    opened: Opened
    port: int
    client: httpx.Client
    runs: Runs | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def link(self) -> str:
        return f"{self.origin}/?token={TOKEN}"

    def get(self, path: str, **query: Any) -> Any:
        answer = self.client.get(path, params=query)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def put(self, number: int, encoder: str, tag: str, **body: Any) -> httpx.Response:
        return self.client.put(f"/api/images/{number}/captions/{encoder}", json=body, headers={"if-match": f'"{tag}"'})

    def number(self, name: str) -> int:
        return next(member.number for member in self.opened.captions.members if member.name == name)

    def caption(self, name: str, encoder: str) -> dict[str, Any]:
        return self.get(f"/api/images/{self.number(name)}")["captions"][encoder]


@contextmanager
def studio(*argv: str | Path, wait: bool = True) -> Iterator[Studio]:
    """Serve what a command line opens, at a free port; `wait` until it is read."""
    classes = parse_options(OPTION_CLASSES, [*map(str, argv), "--port=0"], description="")
    options, server, machines, captions, buckets, run_options = classes
    subsets = subsets_of(options, captions, buckets) if options.names_a_set else []
    opened = Opened(subsets, options.seed, machines) if subsets else None
    runs = runs_of(run_options, subsets)
    listening = listening_socket(server)
    port = listening.getsockname()[1]
    serving = make_server(opened, server, port, TOKEN, runs)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    origin = f"http://127.0.0.1:{port}"
    headers = {"authorization": f"Bearer {TOKEN}", "origin": origin}
    try:
        with httpx.Client(base_url=origin, headers=headers, timeout=10 * PATIENCE) as client:
            wait_for(lambda: serving.started and (opened is None or opened.captions.is_loaded or not wait))
            yield Studio(opened, port, client, runs)
    finally:
        serving.should_exit = True
        thread.join()
        listening.close()


def wait_for(is_so: Any, patience: float = PATIENCE) -> None:
    """Wait until something is so. Raise `TimeoutError` if it never is."""
    end = time.monotonic() + patience
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


def write_set(
    folder: Path, captions: dict[str, tuple[str | None, str | None]], size: tuple[int, int] = (96, 64)
) -> Path:
    """Write images with their captions of L and G, None for no file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (caption_l, caption_g)) in enumerate(captions.items()):
        colour = (40 * number % 256, 90, 200 - 20 * number % 200)
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
        for ending, caption in ((".txt", caption_l), (".caption", caption_g)):
            if caption is not None:
                (folder / f"{name}{ending}").write_bytes(caption.encode())
    return folder
