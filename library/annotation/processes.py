"""Several processes of one run meet at its end, to report as one."""

from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
_LONGEST_WAIT = timedelta(days=1)
"""How long a process that has finished waits for the others, whose images may be larger."""


def gathered(item: Item) -> list[Item]:
    """Return the items of all processes, the same list in each. Every process has to call it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=True, timeout=_LONGEST_WAIT)  # they exchange names and counts alone, which needs no GPU
    return list(gather_object([item]))
