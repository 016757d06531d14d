"""Gradients averaged over processes while the backward pass goes on: a flat tensor for each chunk, in a fixed order."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from library.optim.stepping import Chunk

_IN_FLIGHT = 2
"""Chunks that are exchanged at once: enough to hide the time of one behind the computation of the next."""

OnChunk = Callable[[Chunk], None]


class ChunkExchange:
    """Averages the gradients of chunks over all processes, each as soon as it is complete.

    As DDP does, each gradient is divided by the number of processes and then added up, so that the average has the same
    bits. A process may hand over chunks in the order in which its backward pass completes them; the first pass says
    which order that is, and later ones keep to it, whatever they complete first.
    """

    def __init__(self) -> None:
        self._num_processes = dist.get_world_size()
        self._order: list[Chunk] = []
        self._is_known = False

    @contextmanager
    def averaging(self, then: OnChunk) -> Iterator[OnChunk]:
        """Within the block, hand over every chunk by calling what is yielded: `then` is called with its averages."""
        turn = _Turn(self._num_processes, self._order if self._is_known else None, then)
        yield turn.add
        turn.end()
        if not self._is_known:
            self._order, self._is_known = turn.taken, True
            self._require_same_order()

    def _require_same_order(self) -> None:
        sizes = [sum(parameter.numel() for parameter in chunk.parameters) for chunk in self._order]
        orders: list[list[int]] = [[] for _ in range(self._num_processes)]
        dist.all_gather_object(orders, sizes)
        assert all(order == sizes for order in orders), "the backward pass has another order in another process"


class _Turn:
    """One backward pass: which chunks are ready, which are under way, and which is next."""

    def __init__(self, num_processes: int, order: list[Chunk] | None, then: OnChunk):
        self._num_processes = num_processes
        self._order = None if order is None else deque(order)
        self._then = then
        self._ready: set[Chunk] = set()
        self._under_way: deque[tuple[Chunk, list[Parameter], Tensor | None, dist.Work | None]] = deque()
        self.taken: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Exchange a chunk whose gradients are complete, as soon as those before it are."""
        if self._order is None:
            self._launch(chunk)
            return
        self._ready.add(chunk)
        while self._order and self._order[0] in self._ready:
            self._launch(self._order.popleft())

    def end(self) -> None:
        """Wait for what is under way. All chunks have been added by then."""
        while self._under_way:
            self._arrive()

    def _launch(self, chunk: Chunk) -> None:
        self.taken.append(chunk)
        parameters = [parameter for parameter in chunk.parameters if parameter.grad is not None]
        flat = work = None
        if parameters:
            flat = torch.cat([_taken(parameter).flatten() for parameter in parameters]).mul_(1 / self._num_processes)
            work = dist.all_reduce(flat, async_op=True)
        self._under_way.append((chunk, parameters, flat, work))
        if len(self._under_way) > _IN_FLIGHT:
            self._arrive()

    def _arrive(self) -> None:
        chunk, parameters, flat, work = self._under_way.popleft()
        if flat is not None and work is not None:
            work.wait()
            parts = flat.split([parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view(parameter.shape)
        self._then(chunk)


def _taken(parameter: Parameter) -> Tensor:
    """Return the gradient and free it, once the tensor it is copied into exists."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient
