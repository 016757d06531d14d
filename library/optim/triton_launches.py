"""Programs of Triton: whether there can be any, and how they are run on what lies at addresses of a GPU."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; a message says once what runs on the GPU."""
    found = find_spec("triton") is not None
    if found:
        log.info("the optimizer's weights are updated and rounded in chunks, by programs of Triton")
    else:
        log.warning(
            "Triton is not installed: the optimizer's weights are updated and rounded by torch's own functions, which "
            "launch several times as many kernels. Install triton (on Windows: triton-windows)."
        )
    return found


def address_of(tensor: Tensor) -> int:
    """Return where a tensor lies on its device."""
    return tensor.data_ptr()


def launch(program: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a program of Triton `num_programs` times side by side."""
    from library.optim import chunk_programs as programs

    if num_programs:
        program[(num_programs,)](*arguments, **constants, **programs.LAUNCH)
