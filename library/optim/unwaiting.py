"""Steps of bitsandbytes' optimizers without its wait for the GPU after each weight.

Its kernels run in the order in which they are launched, like all others, so that only paged state, which moves by
itself, has to be waited for. SDXL has 1,680 weights, and a GPU that is waited for after each has nothing to do next.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

_ROOM = "bitsandbytes.optim.optimizer"
_WAIT = "sync_gpu"


@contextmanager
def without_waits(optimizer: Optimizer) -> Iterator[None]:
    """Within the block, `optimizer` does not wait for the GPU, if it is one of bitsandbytes that pages nothing."""
    room = sys.modules.get(_ROOM)
    is_theirs = room is not None and any(each.__module__ == _ROOM for each in type(optimizer).__mro__)
    before = getattr(room, _WAIT, None)  # another release may wait elsewhere, or not at all
    if not is_theirs or before is None or getattr(optimizer, "is_paged", False):
        yield
        return
    setattr(room, _WAIT, lambda _: None)
    try:
        yield
    finally:
        setattr(room, _WAIT, before)
