"""Bits of a vector of numbers seen as another type by torch's compiler for the CPU, which does it number by number.

`view(torch.int32)` of a float32 costs nothing in a register. torch 2.15 writes each vector to memory, converts the
numbers one by one and reads them back, which takes longer than all the rest of stochastic rounding. The bits are the
same either way.
"""

from collections.abc import Mapping
from typing import Any

import torch

_TORCH = "2.15"
"""The release whose internals this knows; another one compiles as it does by itself."""

_NAME = "to_dtype_bitcast"
_before: list[Any] = []


def use_vector_casts(*, wanted: bool = True) -> bool:
    """Let kernels that are compiled from now on cast whole vectors, or with `wanted` false no longer.

    Return whether that is as wanted: other releases of torch are left alone.
    """
    if not torch.__version__.startswith(_TORCH):
        return not wanted
    from torch._inductor.codegen.cpp import CppVecOverrides

    # A class attribute is how inductor itself says what an operation becomes.
    held: Mapping[str, Any] = vars(CppVecOverrides)
    if wanted and held[_NAME].__func__ is not _cast_of_vector:
        _before.append(held[_NAME])
        setattr(CppVecOverrides, _NAME, staticmethod(_cast_of_vector))
    elif not wanted and _before:
        setattr(CppVecOverrides, _NAME, _before.pop())
    return True


def _cast_of_vector(values: Any, dtype: torch.dtype, _: torch.dtype) -> str:
    """Return the C++ expression of a cast, as inductor asks for it."""
    from torch._inductor.virtualized import V

    return f"c10::bit_cast<{V.kernel._get_vec_type(dtype)}>({values})"
