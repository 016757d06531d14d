"""Element-wise functions as one compiled kernel, where a compiler is installed and the tensor is worth it."""

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_WORTH_COMPILING = 2**17
"""Elements of a tensor on the CPU. Compiling takes seconds, and so much work is done in a millisecond without."""

MAX_KERNELS = 48
"""How often one function may be compiled, for tensors of other ranks, precisions or sizes; torch would stop at 8."""

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` of tensors as one kernel for every size, compiled when a first large tensor comes.

    Its first argument decides: small tensors on the CPU, and all where no compiler works (said once, on stderr), take
    the plain function. (On a GPU the plain one would be dozens of launches.) Both give the same numbers but for the
    order in which sums are added up. Numbers that change from call to call do not compile it again.
    """

    @cache
    def kernel() -> Callable[P, R]:
        allow_kernels()
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        is_worth_it = first.is_cuda or first.numel() >= _WORTH_COMPILING
        compiles = is_worth_it and _can_compile(first.device.type)
        return (kernel() if compiles else function)(*args, **kwargs)

    return chosen


def allow_kernels() -> None:
    """Let torch compile each function `MAX_KERNELS` times."""
    torch._dynamo.config.recompile_limit = max(MAX_KERNELS, torch._dynamo.config.recompile_limit)


@cache
def why_not_compiled(device_type: str, backend: str = "inductor") -> str | None:
    """Why `torch.compile` does not work on this kind of device, in its own words, or None where it does; tried once."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(64, device=device_type))
    except (torch._dynamo.exc.BackendCompilerFailed, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return None


@cache
def _can_compile(device_type: str) -> bool:
    reason = why_not_compiled(device_type)
    if reason is not None:
        log.warning(
            "torch.compile does not work here (%s). Optimizer and rounding run as separate operations, which is "
            "slower, with the same result. Install a C++ compiler (for the CPU) or Triton (for a GPU).",
        )
    return reason is None
