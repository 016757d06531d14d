"""What the tests of reliability share: scripts as processes that can be signalled and killed."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked_runs import Command, ForkedRun, RunServer


@pytest.fixture(scope="session")
def _server() -> Iterator[RunServer]:
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked")
    with RunServer() as server:
        yield server


@pytest.fixture
def run_server(_server: RunServer, tmp_path: Path) -> Callable[..., ForkedRun]:
    """`run_server("train", argv, NAME="value")` starts a script in a process, with these environment variables."""
    started: list[ForkedRun] = []

    def start(script: str, argv: list[str], **environment: str) -> ForkedRun:
        if "PORT" in environment:
            environment |= {"MASTER_PORT": environment.pop("PORT"), "MASTER_ADDR": "127.0.0.1"}
        run = _server.start(Command(script, argv, tmp_path / f"said {len(started)}.txt", environment))
        started.append(run)
        return run

    return start


@pytest.fixture
def run_processes(run_server: Callable[..., ForkedRun], free_port: Callable[[], int]) -> Callable[..., list[ForkedRun]]:
    """`run_processes(2, argv)` starts sdxl_train.py in two processes of one run, the main one first."""

    def start(number: int, argv: list[str], script: str = "train", **environment: str) -> list[ForkedRun]:
        shared = {**environment, "WORLD_SIZE": str(number), "PORT": str(free_port())}
        return [run_server(script, argv, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(number)]

    return start


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`free_port()` is a port that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture
def folder_without_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder in which the model is no model: a message about anything else comes before it is opened."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("images/01.png").write_bytes(b"no image")
    Path("model.safetensors").write_bytes(b"no model")
    Path("meta.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")
