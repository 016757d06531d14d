"""Devices, processes and precision of a run: accelerate's object, and how gradients meet between processes."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, gather_object
from torch import nn

from library.training.precision import PrecisionOptions

_PATIENCE = timedelta(days=1)  # for the process that saves and draws, while the others wait


def make_accelerator(precision: PrecisionOptions, trackers: list[str], log_folder: str | Path | None) -> Accelerator:
    """accelerate's object for this process.

    Accumulation is not left to it: it would divide by a fixed number of batches, and the last step of an epoch may
    have fewer, of other sizes (see `EpochOrder`).
    """
    return Accelerator(
        mixed_precision=precision.mixed_precision,
        log_with=trackers or None,
        project_dir=log_folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


@contextmanager
def exchange_gradients(accelerator: Accelerator, networks: Iterable[nn.Module], *, now: bool) -> Iterator[None]:
    """Within the block, `backward` averages gradients over processes if `now`, else it only adds them up here."""
    with ExitStack() as stack:
        if not now:
            for network in networks:
                stack.enter_context(accelerator.no_sync(network))
        yield


def mean_over_processes(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The mean of a number over all processes."""
    return accelerator.reduce(value, reduction="mean")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in one process at least; every process gets the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))


def all_of(accelerator: Accelerator, names: list[str]) -> list[str]:
    """The names that the processes give, of all of them, each once; to be called by every process."""
    return list(dict.fromkeys(gather_object(names)))


def step_seed(seed: int, step: int, process_index: int) -> int:
    """The seed of all that is random in one step of one process.

    Starting anew at every step is what makes a resumed run the same run: there is no state of a generator to keep.
    """
    text = f"{seed}/{step}/{process_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def start_generators(noise: torch.Generator, seed: int, step: int, process_index: int) -> None:
    """Start what is random in a step: the generator of noise and timesteps, and torch's own, used by dropout."""
    noise.manual_seed(step_seed(seed, step, process_index))
    torch.manual_seed(step_seed(seed, -step, process_index))


def draw_seed(accelerator: Accelerator) -> int:
    """A seed for a run that was given none; the same in every process, since each takes its part of one order."""
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"), device=accelerator.device)
    return int(broadcast(seed))
