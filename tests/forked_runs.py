"""Run the project's scripts in separate processes that start at once (POSIX).

Importing torch and diffusers takes seconds. A server process does it once, computes nothing, and forks a child for each
run; the child is an ordinary process that can be signalled and killed.
"""

import functools
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from anywhere, find library/

KILL_AT = "KILL_AT_FILE_OPERATION"
"""Environment variable: the run kills itself just before the n-th writing, renaming or removing in `FOLDER`."""
FOLDER = "KILL_IN_FOLDER"
KILL_BY = "KILL_BY_SIGNAL"
"""Environment variable: the number of the signal, SIGKILL where it is not given."""
REPORT_CALL = "REPORT_FIRST_CALL"
"""Environment variable: the run prints `called NAME` at the first call of this function, "module:Class.method"."""
NO_MEMORY_AT = "NO_MEMORY_AT_CALL"
"""Environment variable: the n-th call of a function, "2 module:Class.method", allocates more memory than there is."""
LIMIT_MEMORY = "LIMIT_MEMORY_TO_BYTES"
"""Environment variable: the run may map so many bytes more than it has when it starts."""
END_AT_ONCE = "END_AT_ONCE"
"""Environment variable: the run ends without Python's shutdown, which takes seconds after torch has been imported."""
_FILE_OPERATIONS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"})
_END = "end\n"
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Command:
    """One process to be: a script of `serve`, its arguments, output and environment."""

    script: str
    argv: Sequence[str]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class ForkedRun:
    """A process of the server that runs a script; it leads its own process group."""

    def __init__(self, pid: int, output: Path, status_file: Path):
        self.pid = pid
        self._output = output
        self._status_file = status_file

    @property
    def said(self) -> str:
        """What it has printed so far, both streams."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def send(self, signal_number: int, *, to_group: bool = False) -> None:
        """Signal the process, or with `to_group` its workers too, as a terminal does."""
        (os.killpg if to_group else os.kill)(self.pid, signal_number)

    def kill(self) -> None:
        """End the process and its workers at once, if it has not ended, and wait for that."""
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL, to_group=True)
        self.wait()

    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self._status_file.exists()

    def wait_until_said(self, text: str, timeout: float = 60) -> None:
        """Wait for the process to print `text`."""
        self.wait_until(lambda: text in self.said, f"said '{text}'", timeout)

    def wait_until_called(self, function: str) -> None:
        """Wait for the first call of the function that `REPORT_CALL` names."""
        self.wait_until_said(_report_of(function))

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 60) -> None:
        """Wait for a condition; `what` completes "the run has not ..."."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or (self.is_over() and not condition()):
                raise TimeoutError(f"the run has not {what}: {self.said}")
            time.sleep(_POLL_SECONDS)

    def wait_or_go_on(self, seconds: float) -> bool:
        """Wait for its end, but no longer than `seconds`; return whether it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.is_over():
            time.sleep(_POLL_SECONDS)
        return self.is_over()

    def wait(self, timeout: float = 120) -> int:
        """Its exit status once it has ended; that of a killed process is minus the signal's number."""
        self.wait_until(self.is_over, "ended", timeout)
        return int(self._status_file.read_text(encoding="ascii"))


class RunServer:
    """Starts runs; a context manager, since its process must end."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
        )
        self._answer()

    def __enter__(self) -> "RunServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # told, since a closed pipe says nothing while a worker that this process forked has a copy of it
        self._process.communicate(_END)

    def start(self, command: Command) -> ForkedRun:
        """The process of a command, which is running."""
        assert self._process.stdin is not None
        command.output.touch()
        self._process.stdin.write(json.dumps(asdict(command), default=str) + "\n")
        self._process.stdin.flush()
        return ForkedRun(int(self._answer()), command.output, _status_file(command.output))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


# -- in the server's process ------------------------------------------------------------------------------------------


def _call(argv: Sequence[str]) -> int:
    """Call a function of the tests, "module:function", with the other arguments."""
    module, _, name = argv[0].partition(":")
    getattr(importlib.import_module(module), name)(*argv[1:])
    return 0


def _status_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.status")


def serve() -> None:
    """Fork a process for each command that comes in."""
    import sdxl_train
    from finetune import (
        prepare_buckets_latents,
        sdxl_merge_captions_g_to_metadata,
        sdxl_merge_captions_l_to_metadata,
    )

    for module in ("torch.utils.tensorboard", "library.training.setup"):  # which each run would import
        importlib.import_module(module)
    scripts = {
        "train": sdxl_train.main,
        "prepare": prepare_buckets_latents.main,
        "merge_g": sdxl_merge_captions_g_to_metadata.main,
        "merge_l": sdxl_merge_captions_l_to_metadata.main,
        "call": _call,
    }
    gc.freeze()  # or the first collection in a child copies all memory
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        if line == _END:
            break
        content = json.loads(line)
        _status_file(Path(content["output"])).unlink(missing_ok=True)
        if os.fork() == 0:  # waits for the run, which need not be waited for by anybody else
            pid = os.fork()
            if pid == 0:
                _prepare_process(content)
                status = scripts[content["script"]](content["argv"])
                if END_AT_ONCE in os.environ:
                    _end_at_once(status)
                gc.unfreeze()  # or triton prints what is never collected as leaked, behind the last words of the run
                sys.exit(status)
            print(pid, flush=True)
            _note_status(pid, _status_file(Path(content["output"])))
            os._exit(0)


def _prepare_process(content: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(content["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(content["environment"])
    if LIMIT_MEMORY in os.environ:
        _limit_memory(int(os.environ[LIMIT_MEMORY]))
    tqdm.set_lock(threading.RLock())  # its own: one that all forks share stays locked when a killed one holds it
    if REPORT_CALL in os.environ:
        _report_first_call(os.environ[REPORT_CALL])
    if NO_MEMORY_AT in os.environ:
        _allocate_too_much(os.environ[NO_MEMORY_AT])
    if KILL_AT in os.environ:
        _kill_at(int(os.environ[KILL_AT]), os.environ[FOLDER])


def _limit_memory(num_bytes: int) -> None:
    import resource

    import psutil

    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, now + num_bytes))


def _end_at_once(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _note_status(pid: int, file: Path) -> None:
    _, status = os.waitpid(pid, 0)
    part = file.with_suffix(".new")
    part.write_text(str(os.waitstatus_to_exitcode(status)), encoding="ascii")
    part.rename(file)


def _report_of(function: str) -> str:
    return f"called {function}\n"


def _found(function: str) -> tuple[Any, str]:
    """What has a function "module:Class.method", and its name there."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def _allocate_too_much(call: str) -> None:
    import torch

    number, _, function = call.partition(" ")
    owner, name = _found(function)
    called, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(called)
    def allocating(*arguments: Any, **named: Any) -> Any:
        if next(calls) == int(number):
            torch.empty(2**62, dtype=torch.uint8)
        return called(*arguments, **named)

    setattr(owner, name, allocating)


def _report_first_call(function: str) -> None:
    owner, name = _found(function)
    called = getattr(owner, name)

    @functools.wraps(called)
    def reporting(*arguments: Any, **named: Any) -> Any:
        print(_report_of(function), end="", flush=True)
        setattr(owner, name, called)
        return called(*arguments, **named)

    setattr(owner, name, reporting)


def _kill_at(number: int, folder: str) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _FILE_OPERATIONS and folder in str(arguments[0]) and not is_reading:
            count += 1
            if count == number:
                os.kill(os.getpid(), int(os.environ.get(KILL_BY, signal.SIGKILL)))

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
