"""Tables on the device that change from step to step: made for each step, or held at places that a CUDA graph reads."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from library.sdxl.device_copies import to_device


class StepTables:
    """Copies tables of a step to the device, each under a key and always of the same size.

    What a graph was captured with must stay where it is: within `holding` a table is not copied, and its place is
    returned instead. `write` then copies all of them at once.
    """

    def __init__(self) -> None:
        self._contents: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, Tensor] = {}
        self._blocks: list[tuple[Tensor, list[Hashable]]] = []
        self.holds = False

    def on_device(self, key: Hashable, content: Tensor, device: torch.device) -> Tensor:
        """Return `content` on the device; within `holding` the place where `write` will copy it."""
        self._contents[key] = content
        return self._places[key] if self.holds else to_device(content, device)

    @contextmanager
    def holding(self, device: torch.device) -> Iterator[None]:
        """Within the block nothing is copied. Every table must have been on the device before."""
        self.make_places(device)
        self.holds = True
        try:
            yield
        finally:
            self.holds = False

    def make_places(self, device: torch.device) -> None:
        """Make a place for each table that has none; places never move."""
        missing = [key for key in self._contents if key not in self._places]
        for dtype in dict.fromkeys(self._contents[key].dtype for key in missing):
            keys = [key for key in missing if self._contents[key].dtype == dtype]
            sizes = [self._contents[key].numel() for key in keys]
            block = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for key, part in zip(keys, block.split(sizes), strict=True):
                self._places[key] = part.view(self._contents[key].shape)
            self._blocks.append((block, keys))

    def change(self, key: Hashable, content: Tensor) -> None:
        """Let `write` copy this under the key."""
        self._contents[key] = content

    def write(self) -> None:
        """Copy all tables to their places, queued behind the GPU's work: one copy for each block of places."""
        for block, keys in self._blocks:
            block.copy_(to_device(torch.cat([self._contents[key].flatten() for key in keys]), block.device))
