"""A script in two processes, with the environment in which `accelerate launch` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def in_two_processes(script, folder: Path, *flags: object) -> tuple[list[int], str, str]:
    """Run a script in both; return their statuses, and what they printed on both streams."""
    file = REPOSITORY / f"{script.__name__.replace('.', '/')}.py"
    return twice([str(file), str(folder), *map(str, flags)])


def twice(arguments: list[str]) -> tuple[list[int], str, str]:
    """Run Python with these arguments in both; return their statuses, and what they printed on both streams."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "PYTHONPATH": REPOSITORY}
    processes = []
    for rank in (0, 1):
        names = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **names}, encoding="utf-8", **pipes))
    printed = [process.communicate(timeout=300) for process in processes]
    out, err = ("".join(streams) for streams in zip(*printed, strict=True))
    return [process.returncode for process in processes], out, err
