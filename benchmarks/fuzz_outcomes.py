"""How a command ended that was given something absurd: by success, by one line of error, or otherwise."""

import contextlib
import io
import multiprocessing
import resource
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from library.config.errors import EXIT_USER_ERROR

_BYTES_OF_A_RUN = 12 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "success", "refused", or what is wrong with it."""

    name: str
    details: str = ""


def outcome_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> Outcome:
    """Call the entry point of a script, or what checks its options, in the current folder."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = main(argv)
    except SystemExit as ending:
        return Outcome("help") if ending.code == 0 else Outcome("exit", f"status {ending.code}")
    except BaseException:  # noqa: BLE001 (the point of it: anything else than a message is a finding)
        return Outcome("exception", traceback.format_exc())
    if status == 0:
        return Outcome("success")
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if status == EXIT_USER_ERROR and len(errors) == 1 and "Traceback" not in said.getvalue():
        return Outcome("refused")
    return Outcome("message", f"status {status}: {said.getvalue()}")


def outcome_in_process(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, seconds: float) -> Outcome:
    """Call the entry point of a script in a process of bounded memory, and wait so long for it."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # those of the parent are not here, and OpenMP would wait for them
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES_OF_A_RUN, _BYTES_OF_A_RUN))
        sending.send(outcome_of(main, argv))

    process = context.Process(target=run)
    process.start()
    sending.close()  # so that the end of the process is the end of the pipe
    try:
        outcome = receiving.recv() if receiving.poll(seconds) else Outcome("endless")
    except EOFError:
        process.join()
        return Outcome("killed", f"status {process.exitcode}")
    process.join(1.0)
    if process.is_alive():
        process.kill()
        process.join()
    return outcome
