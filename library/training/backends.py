"""How torch computes on a GPU: what is chosen for a run, and what the user is told of it."""

import logging
import os
import shutil

import torch
import torch.utils.deterministic
from accelerate.utils import parse_flag_from_env

from library.training.precision import PrecisionOptions

log = logging.getLogger(__name__)

_NO_DRIVER = "Found no NVIDIA driver"
"""What torch says where there is no NVIDIA card, or no driver for it."""


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
        _warn_of_imitated_bfloat16(precision, device)
    if device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        _tell_why_on_cpu()


def _warn_of_imitated_bfloat16(precision: PrecisionOptions, device: torch.device) -> None:
    """Warn if a GPU has no bfloat16 and the run uses it: torch imitates it, which is exact and slow."""
    if precision.mixed_precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    major, minor = torch.cuda.get_device_capability(device)
    log.warning(
        "this GPU has no bfloat16 (compute capability %d.%d, 8.0 is needed), and torch imitates it. Faster, if the "
        "memory suffices: --mixed_precision=fp16 without --full_bf16.",
        *(major, minor),
    )


def _tell_why_on_cpu() -> None:
    """Log why no GPU is used; a warning where there is one that this torch cannot use."""
    if torch.version.cuda is None:
        has_card = shutil.which("nvidia-smi") is not None
        reason = f"torch {torch.__version__} is built without CUDA; builds with it: https://pytorch.org/get-started"
    else:
        reason = _why_no_cuda()
        has_card = _NO_DRIVER not in reason
    log.log(logging.WARNING if has_card else logging.INFO, "no GPU is used, training runs on the CPU: %s", reason)


def _why_no_cuda() -> str:
    """Return torch's reason, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return "none is visible (CUDA_VISIBLE_DEVICES?)" if torch.cuda.device_count() == 0 else "accelerate chose the CPU"


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
