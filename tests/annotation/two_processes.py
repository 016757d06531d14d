"""A script in two processes, as `accelerate launch` starts them, forked from this one: torch is imported already."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

from tests.conftest import forget_accelerator


def in_two_processes(script, folder: Path, *flags: object) -> tuple[list[int], str, str]:
    """Run a script in both; return their statuses, and what they printed on both streams."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = folder.parent / "logs"
    logs.mkdir()
    argv = [str(folder), *map(str, flags)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(script, argv, rank, port, logs)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    out, err = ("".join((logs / f"{rank}.{name}").read_text("utf-8") for rank in (0, 1)) for name in ("out", "err"))
    return [process.exitcode for process in processes], out, err


def _run(script, argv: list[str], rank: int, port: int, logs: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
    forget_accelerator()
    status = script.main(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
