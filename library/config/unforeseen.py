"""What no script expects (no memory, a lost process, a defect): one line with a remedy, and the traceback in a file."""

import logging
import os
import re
import tempfile
import traceback

from library.config.errors import UserError
from library.config.processes import share_of_process

log = logging.getLogger(__name__)

EXIT_UNFORESEEN = 1

_SHARED_MEMORY = (
    "the shared memory (/dev/shm), through which worker processes hand over batches, is full",
    "Start the container with --shm-size=8g or --ipc=host, or pass --max_data_loader_n_workers=0.",
)
_MEMORY = (
    "this machine is out of memory",
    "Close other programs, use smaller batches or fewer worker processes.",
)
_LOST_PROCESS = (
    "another process of this run has ended or cannot be reached",
    "Look at the messages of the other processes, and start all of them again.",
)
_KINDS = (  # a type of error or a pattern of its text, what happened, what helps
    (r"shared memory|Bus error|/torch_\d+", *_SHARED_MEMORY),
    (
        # The second is what a batch on its way from a worker raises; the connections between GPUs have their own.
        r"DataLoader worker.*(killed by signal|exited unexpectedly)|^ConnectionResetError: \[Errno",
        "a worker process that reads images has ended, as if killed by the system",
        "Usually memory is short: lower --max_data_loader_n_workers or close other programs.",
    ),
    (
        r"OutOfMemoryError|CUDA out of memory",
        "the GPU is out of memory",
        "Use smaller batches, and close other programs that use the GPU.",
    ),
    (r"MemoryError|can't allocate memory|not enough memory", *_MEMORY),
    (
        r"CUDA|cuDNN|CUBLAS|HIP error|AcceleratorError",
        "the GPU or its driver has failed",
        "Look at nvidia-smi (heat, power, an overclocked card), restart the machine if it hangs, and start again.",
    ),
    (r"[Cc]onnection (closed|reset)|Broken pipe", *_LOST_PROCESS),
    (
        r"Timed out waiting|monitoredBarrier|collective operation timeout",
        "another process of this run does not answer: it is stopped, or waits for a disk",
        "Look at the messages of the other processes, end them, and start all of them again.",
    ),
    (r"gloo|NCCL|ProcessGroup|DistNetworkError", *_LOST_PROCESS),
    (
        r"Too many open files",
        "this process may not open more files",
        "Raise the limit (ulimit -n 65536), or lower --max_data_loader_n_workers.",
    ),
)
_DEFECT = ("something happened that this program does not expect", "Please report it with that file.")


class UnforeseenError(UserError):
    """What the user has no part in; the traceback is in a file that the message names."""

    exit_status = EXIT_UNFORESEEN


def explained(error: BaseException) -> UnforeseenError:
    """Return an error that says in one line what happened and what helps; write the traceback into a file."""
    text = f"{type(error).__name__}: {error}"
    found = (kind[1:] for kind in _KINDS if re.search(kind[0], text, re.DOTALL))
    what, remedy = next(found, _DEFECT)
    file = _traceback_file(error)
    where = "" if file is None else f" The traceback is in '{file}'."
    failure = UnforeseenError(f"{what} ({_reason(error)}).{where}", remedy)
    # All others miss a process; two of them say it, since the first may be the one that is missed.
    failure.is_shared = what == _LOST_PROCESS[0] and share_of_process().index > 1
    return failure


def _reason(error: BaseException) -> str:
    """Return type and first line of an error; of one that a worker process has passed on, those it had there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):  # the traceback of the worker follows
        return lines[-1]
    return ": ".join([type(error).__name__, *lines[:1]])


def _traceback_file(error: BaseException) -> str | None:
    """Write the traceback into a new temporary file; return its path, None if that is impossible."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="sdxl-traceback-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except (OSError, MemoryError) as refusal:
        log.debug("the traceback cannot be written (%s)", refusal)
        return None
    return path
