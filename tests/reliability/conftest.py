"""What the tests of reliability share: scripts as processes that can be signalled and killed."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import BUCKET_FLAGS, RATE, PreparedSet, base_flags
from tests.forked_runs import Command, ForkedRun, RunServer
from tests.outcome import outcome_of

LIMIT_OF_BFLOAT16 = 0.1
"""How far runs in bfloat16 may be from each other whose sums have another order, in parts of what is learnt.

Each such sum may be another neighbour in bfloat16, 1/256 away: 0.05 to 0.06 were measured after three steps.
"""


class Runs:
    """Runs of one set of flags in different numbers of processes; each accumulates what the others share."""

    def __init__(self, argv: list[str], folder: Path, start: Callable[..., list[ForkedRun]]):
        self.argv = argv
        self._start = start
        self.folder = folder

    def start(self, name: str, num_processes: int, *flags: str, **environment: str) -> list[ForkedRun]:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        paths = f"--output_dir={folder / 'output'}", f"--logging_dir={folder / 'logs'}"
        return self._start(num_processes, [*self.argv, *paths, *flags], END_AT_ONCE="1", **environment)

    def run(self, name: str, num_processes: int, *flags: str, **environment: str) -> None:
        """A run to its end, which is a good one."""
        for each in self.start(name, num_processes, *flags, **environment):
            assert each.wait(timeout=600) == 0, each.said

    def outcome(self, name: str) -> dict:
        return outcome_of(self.folder / name / "output", self.folder / name / "logs")

    def distance(self, name: str, other: str, start: Path) -> float:
        """How far the models of two runs are from each other, in parts of what the first has learnt."""
        one, two, first = self.outcome(name)["model m"], self.outcome(other)["model m"], load_file(start)
        apart = torch.stack([(one[key].float() - two[key].float()).norm() for key in one]).norm()
        learnt = torch.stack([(one[key].float() - first[key].float()).norm() for key in one]).norm()
        assert learnt > 0
        return float(apart / learnt)

    def output(self, name: str) -> Path:
        return self.folder / name / "output"


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


@pytest.fixture
def runs(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, run_processes) -> Runs:
    argv = [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path)[:-1],
        *("--output_name=m", "--resolution=128,128", "--seed=7", "--max_data_loader_n_workers=0", "--flip_aug"),
        *("--max_train_steps=3", f"--learning_rate={RATE}", "--max_grad_norm=0", *BUCKET_FLAGS),
    ]
    return Runs(argv, tmp_path, run_processes)


@pytest.fixture
def together(run_processes) -> Callable[..., None]:
    """`together(2, function)` calls a function in two processes, without an error."""

    def call(number: int, function: Callable[..., None], *arguments: str, **environment: str) -> None:
        argv = [f"{function.__module__}:{function.__name__}", *arguments]
        for each in run_processes(number, argv, script="call", END_AT_ONCE="1", **environment):
            assert each.wait(timeout=600) == 0, each.said

    return call
