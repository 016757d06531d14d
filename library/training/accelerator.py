"""The accelerator of a run and its seeds: what decides device, precision and every random draw."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast, parse_flag_from_env

from library.config.digests import digest
from library.config.errors import UserError
from library.config.magnitudes import DDP_TIMEOUT
from library.config.processes import leave_group_at_end, share_of_process
from library.data.dataset import Batch
from library.training.precision import PrecisionOptions
from library.training.process_options import ProcessOptions, asks_for_shards
from library.training.progress import BY_IMAGE
from library.training.run_options import TrainingOptions
from library.training.sharding import without_accelerates_sharding


def make_accelerator(
    precision: PrecisionOptions,
    trackers: list[str],
    log_folder: str | Path | None,
    processes: ProcessOptions = ProcessOptions(),  # noqa: B008 (a value)
) -> Accelerator:
    """Return accelerate's object for this process. Raise `UserError` if it builds another run than was asked for.

    Gradient accumulation is not left to it: it would divide by a fixed number of batches, and the last step of an epoch
    may have fewer, of other sizes (see `EpochOrder`). Gradients lie in the buffers of their exchange, not beside them:
    4.8 GiB less for the U-Net in bfloat16.
    """
    require_devices()
    patience = timedelta(minutes=processes.ddp_timeout or DDP_TIMEOUT)
    exchange = DistributedDataParallelKwargs(
        gradient_as_bucket_view=processes.ddp_gradient_as_bucket_view, static_graph=processes.ddp_static_graph
    )
    with without_accelerates_sharding():
        accelerator = Accelerator(
            mixed_precision=precision.mixed_precision,
            log_with=trackers or None,
            project_dir=log_folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=patience), exchange],
        )
    leave_group_at_end()
    asked = share_of_process().count
    if accelerator.num_processes != asked:
        raise UserError(
            f"the launcher asks for {asked} processes, and accelerate runs {accelerator.num_processes}.",
            "Start them with `accelerate launch` or `torchrun` (docs/many-gpus.md).",
        )
    return accelerator


def require_devices() -> None:
    """Raise `UserError` if more processes than GPUs are to train on this machine; processes on CPUs may be any."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = 0 if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.cuda.device_count()
    if 0 < num_gpus < local:
        raise UserError(
            f"{local} processes are started on this machine, which has {num_gpus} GPUs.",
            "Start as many as there are GPUs (--num_processes, --nproc_per_node), or set ACCELERATE_USE_CPU=true.",
        )


def described_processes(accelerator: Accelerator) -> str:
    """Return how many processes train, on what, and how they exchange gradients: "2 processes on cuda (DDP, nccl)"."""
    if accelerator.num_processes == 1:
        return f"one process on {accelerator.device.type}"
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "XLA"
    engine = "FSDP2" if asks_for_shards(os.environ) else "DDP"
    return f"{accelerator.num_processes} processes on {accelerator.device.type} ({engine}, {backend})"


def make_accelerator_of(options: TrainingOptions) -> Accelerator:
    """Return accelerate's object as the options of the run have it."""
    tracking = options.tracking
    return make_accelerator(options.precision, tracking.trackers, tracking.logging_dir, options.processes)


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Return the seed of everything random in one step of one process.

    Generators start at every step, which is what makes a resumed run the same run: no generator state has to be kept.
    """
    text = f"{seed}/{step}/{process_index}"
    return int.from_bytes(digest([text.encode()], 8), "little")


def start_step(seed: int, step: int, process_index: int, noise_by: str) -> Callable[[Batch], list[torch.Generator]]:
    """Return the generators of noise and timesteps of each batch of a step; seed torch's default one, used by dropout.

    Each image has a generator, so that it gets the same noise however the step is split over batches and processes.
    In runs that began before this rule, all batches that one process has in the step share a generator.
    """
    torch.manual_seed(step_seed(seed, -step, process_index))
    if noise_by == BY_IMAGE:
        return lambda batch: [torch.Generator().manual_seed(seed) for seed in batch.noise_seeds]
    of_step = torch.Generator().manual_seed(step_seed(seed, step, process_index))
    return lambda batch: [of_step]


def draw_seed(accelerator: Accelerator) -> int:
    """Draw a seed for a run without one; the same in every process, since each takes its part of one order."""
    seed = torch.tensor(int.from_bytes(os.urandom(4), "little"), device=accelerator.device)
    return int(broadcast(seed))
