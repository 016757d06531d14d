"""Devices, processes and precision of a run: accelerate's object, and how gradients meet between processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from library.training.precision import PrecisionOptions
from library.training.tracking import TrackingOptions


def make_accelerator(precision: PrecisionOptions, tracking: TrackingOptions, now: datetime) -> Accelerator:
    """accelerate's object for this process.

    Accumulation is not left to it: it would divide by a fixed number of batches, and the last step of an epoch may
    have fewer, of other sizes (see `EpochOrder`).
    """
    return Accelerator(
        mixed_precision=precision.mixed_precision,
        log_with=tracking.trackers,
        project_dir=tracking.run_folder(now),
    )


@contextmanager
def exchange_gradients(accelerator: Accelerator, networks: Sequence[nn.Module], *, now: bool) -> Iterator[None]:
    """Within the block, `backward` averages gradients over processes if `now`, else it only adds them up here."""
    with ExitStack() as stack:
        if not now:
            for network in networks:
                stack.enter_context(accelerator.no_sync(network))
        yield


def mean_over_processes(accelerator: Accelerator, value: torch.Tensor) -> float:
    """The mean of a number over all processes."""
    return float(accelerator.reduce(value, reduction="mean"))


def draw_seed(accelerator: Accelerator) -> int:
    """A seed for a run that was given none; the same in every process, since each takes its part of one order."""
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"), device=accelerator.device)
    return int(broadcast(seed))
