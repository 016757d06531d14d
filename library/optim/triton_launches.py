"""Programs of Triton: whether there can be any, and how they are run on what lies at addresses of a GPU."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Return whether programs of Triton run on the GPU, tried once; a message says what runs there."""
    from library.optim.triton_trial import why_not

    reason = why_not(torch.device("cuda"))
    if reason is None:
        log.info("the optimizer's weights are updated and rounded in chunks, by programs of Triton")
    else:
        log.warning(
            "Triton cannot be used (%s): the optimizer's weights are updated and rounded by torch's own functions, "
            "which launch several times as many kernels. Triton needs the package triton (on Windows: triton-windows) "
            "and a C compiler.",
            reason,
        )
    return reason is None


def address_of(tensor: Tensor) -> int:
    """Return where a tensor lies on its device."""
    return tensor.data_ptr()


def launch(program: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a program of Triton `num_programs` times side by side."""
    from library.optim import chunk_programs as programs

    if num_programs:
        program[(num_programs,)](*arguments, **constants, **programs.LAUNCH)
