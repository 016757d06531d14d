"""Element-wise functions as one compiled kernel, where a compiler is installed and the tensor is worth it."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_WORTH_COMPILING = 2**17
"""Elements of a tensor on the CPU. Compiling takes seconds, and so much work is done in a millisecond without."""

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` of tensors as one kernel for every size, compiled when a first large tensor comes.

    Its first argument decides: small tensors on the CPU, and all where no compiler works (said once, on stderr), take
    the plain function. (On a GPU the plain one would be dozens of launches.) Both give the same numbers but for the
    order in which sums are added up. Numbers that change from call to call do not compile it anew.
    """

    @cache
    def kernel() -> Callable[P, R]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        is_worth_it = first.is_cuda or first.numel() >= _WORTH_COMPILING
        compiles = is_worth_it and can_compile(first.device.type)
        return (kernel() if compiles else function)(*args, **kwargs)

    return chosen


@cache
def can_compile(device_type: str) -> bool:
    """Whether `torch.compile` works on this kind of device; tried once, and the reason is said where it does not."""
    from torch._dynamo.exc import BackendCompilerFailed  # costs a second, and only those who compile need it

    try:
        torch.compile(torch.neg)(torch.ones(64, device=device_type))
    except (BackendCompilerFailed, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        print(
            f"torch.compile does not work here ({reason}). Optimizer and rounding run as separate operations, which is "
            "slower and gives the same. A C++ compiler (for the CPU) or Triton (for a GPU) mends it.",
            file=sys.stderr,
        )
        return False
    return True
