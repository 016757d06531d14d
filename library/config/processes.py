"""Several processes of one run share its work, and meet to report as one."""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
_LONGEST_WAIT = timedelta(days=1)
"""How long a process that has finished waits for the others, whose images may be larger."""


@dataclass(frozen=True)
class Share:
    """The part of the work that one process of a run does: `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process does what one of them has to."""
        return self.index == 0

    def has(self, number: int) -> bool:
        """Return whether this process does a piece of work: they are dealt out in turn."""
        return number % self.count == self.index

    def in_turn(self, act: Callable[[], None]) -> None:
        """Act in one process after another. Every process has to call it."""
        for turn in range(self.count):
            if turn == self.index:
                act()
            self.gathered(None)

    def gathered(self, item: Item) -> Sequence[Item]:
        """Return the items of all processes, the same in each. Every process has to call it."""
        return [item] if self.count == 1 else gathered(item)


def share_of_process() -> Share:
    """Return the share of this process, as `accelerate launch` and torchrun tell it."""
    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def gathered(item: Item) -> list[Item]:
    """Return the items of all processes, the same list in each. Every process has to call it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=True, timeout=_LONGEST_WAIT)  # they exchange names and counts alone, which needs no GPU
    leave_group_at_end()
    return list(gather_object([item]))


def leave_group_at_end() -> None:
    """Let this process leave its group, if it is in one then, before Python ends.

    Gloo's threads must not outlive Python, or one process in ten aborts in place of its exit status.
    """
    atexit.unregister(_leave_group)  # once is enough
    atexit.register(_leave_group)


def _leave_group() -> None:
    from torch import distributed

    # NCCL's would wait for what is still going on, and after an error others may never finish it.
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
