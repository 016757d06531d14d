"""Functions of tensors as one compiled kernel, where a compiler is installed and the tensor is large enough."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from library.optim.kernel_cache import with_whole_kernels
from library.optim.vector_casts import use_vector_casts

log = logging.getLogger(__name__)

_WORTH_COMPILING = 2**17
"""Elements of a tensor on the CPU. Compiling takes seconds; smaller tensors take less than a millisecond without."""

MAX_KERNELS = 48
"""How often one function may be compiled, for other ranks, precisions or sizes; the default of torch is 8."""

_compiles_nothing = False

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` as one kernel for tensors of every size, compiled at the first call with a large tensor.

    The first argument decides. Small tensors on the CPU, and all tensors where no compiler works (a warning says so
    once), take the plain function, which on a GPU would be dozens of launches. Both return the same numbers except for
    the order in which sums are added up. Numbers that change from call to call do not compile it again.
    """

    @cache
    def kernel() -> Callable[P, R]:
        allow_kernels()
        return with_whole_kernels(torch.compile(function, dynamic=True))

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        is_worth_it = first.is_cuda or first.numel() >= _WORTH_COMPILING
        compiles = is_worth_it and not _compiles_nothing and _can_compile(first.device.type)
        return (kernel() if compiles else function)(*args, **kwargs)

    return chosen


@contextmanager
def without_compiling() -> Iterator[None]:
    """Within the block the plain functions run: a try on a few numbers is not worth the seconds of compiling."""
    global _compiles_nothing
    before, _compiles_nothing = _compiles_nothing, True
    try:
        yield
    finally:
        _compiles_nothing = before


def allow_kernels() -> None:
    """Let torch compile each function `MAX_KERNELS` times."""
    torch._dynamo.config.recompile_limit = max(MAX_KERNELS, torch._dynamo.config.recompile_limit)


@cache
def why_not_compiled(device_type: str, backend: str = "inductor") -> str | None:
    """Return the reason, from torch, why `torch.compile` does not work on this kind of device, or None; tried once."""
    if device_type == "cpu" and backend == "inductor" and use_vector_casts():
        if _failure(_next_float, backend, device_type) is None:
            return None
        use_vector_casts(wanted=False)  # a compiler that does not know them may do well without
    return _failure(torch.neg, backend, device_type)


def _failure(function: Callable[[Tensor], Tensor], backend: str, device_type: str) -> str | None:
    try:
        with_whole_kernels(torch.compile(function, backend=backend))(torch.ones(64, device=device_type))
    except (torch._dynamo.exc.BackendCompilerFailed, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return None


def _next_float(values: Tensor) -> Tensor:
    return (values.view(torch.int32) + 1).view(torch.float32)


@cache
def _can_compile(device_type: str) -> bool:
    reason = why_not_compiled(device_type)
    if reason is None:
        log.info("the first step compiles kernels of the optimizer and takes longer than the others")
    else:
        log.warning(
            "torch.compile does not work here (%s). Optimizer and rounding run as separate operations, which is "
            "slower, with the same result. Install a C++ compiler (for the CPU) or Triton (for a GPU).",
            reason,
        )
    return reason is None
