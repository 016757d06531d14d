"""How torch computes on a GPU: what is chosen for a run, and what the user is told of it."""

import logging
import os

import torch
import torch.utils.deterministic

from library.training.precision import PrecisionOptions

log = logging.getLogger(__name__)


def choose_backends(precision: PrecisionOptions, device: torch.device, *, deterministic: bool) -> None:
    """Choose precision and kernels of a run on `device`; log the choice if it is a GPU.

    With mixed precision the few products left in float32 may be rounded to TF32, which is finer than bfloat16 and
    float16; without it float32 means float32. cuDNN picks its convolutions by rule, not by timing them, so that two
    runs pick the same ones. With `deterministic` only kernels are used that return the same bits in each run.
    """
    in_float32 = "ieee" if precision.mixed_precision == "no" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = in_float32
    torch.backends.cudnn.conv.fp32_precision = in_float32  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(deterministic)
    # Memory that is never read need not be filled, whatever that costs in debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        log.info(_as_said(device, in_float32, deterministic=deterministic))


def _as_said(device: torch.device, in_float32: str, *, deterministic: bool) -> str:
    about = torch.cuda.get_device_properties(device)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "torch's default"
    repeats = (
        "deterministic kernels: two runs are the same bit for bit"
        if deterministic
        else "the fastest kernels: two runs differ in last bits (--deterministic)"
    )
    return (
        f"GPU: {about.name}, {about.total_memory / 2**30:.1f} GiB; float32 products in "
        f"{'TF32' if in_float32 == 'tf32' else 'float32'}, allocator {allocator}, {repeats}"
    )
