"""The accelerator of a run and its seeds: what decides device, precision and every random draw."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast

from library.config.digests import digest
from library.config.magnitudes import DDP_TIMEOUT
from library.training.precision import PrecisionOptions
from library.training.run_options import TrainingOptions


def make_accelerator(
    precision: PrecisionOptions,
    trackers: list[str],
    log_folder: str | Path | None,
    patience: timedelta = timedelta(minutes=DDP_TIMEOUT),
) -> Accelerator:
    """Return accelerate's object for this process; `patience` is how long it waits for the others in a step.

    Gradient accumulation is not left to it: it would divide by a fixed number of batches, and the last step of an epoch
    may have fewer, of other sizes (see `EpochOrder`). Gradients lie in the buffers of their exchange, not beside them:
    4.8 GiB less for the U-Net in bfloat16.
    """
    return Accelerator(
        mixed_precision=precision.mixed_precision,
        log_with=trackers or None,
        project_dir=log_folder,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


def make_accelerator_of(options: TrainingOptions) -> Accelerator:
    """Return accelerate's object as the options of the run have it."""
    tracking, patience = options.tracking, timedelta(minutes=options.run.ddp_timeout or DDP_TIMEOUT)
    return make_accelerator(options.precision, tracking.trackers, tracking.logging_dir, patience)


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Return the seed of everything random in one step of one process.

    Generators start at every step, which is what makes a resumed run the same run: no generator state has to be kept.
    """
    text = f"{seed}/{step}/{process_index}"
    return int.from_bytes(digest([text.encode()], 8), "little")


def start_generators(noise: torch.Generator, seed: int, step: int, process_index: int) -> None:
    """Seed what is random in a step: the generator of noise and timesteps, and torch's default one, used by dropout."""
    noise.manual_seed(step_seed(seed, step, process_index))
    torch.manual_seed(step_seed(seed, -step, process_index))


def draw_seed(accelerator: Accelerator) -> int:
    """Draw a seed for a run without one; the same in every process, since each takes its part of one order."""
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"), device=accelerator.device)
    return int(broadcast(seed))
