"""The state of an optimizer in host memory, copied to the device for the update of the weights that it belongs to.

AdamW keeps as much as the weights twice over. On a GPU the copies run beside the computation: while some weights are
updated (in the fused backward pass: while the gradients of the next ones are computed), the state of the next ones
arrives and that of the former ones returns, each on a stream of its kind. The updates are the same, to the last bit.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.state_places import stays_on_cpu

_SLAB = 2**28
"""Bytes of pinned memory that are allocated at once: torch rounds each allocation up to a power of two."""
_ALIGNMENT = 64


class OffloadedStates:
    """The state of `optimizer`, which it has on the device only between `bring` and `put_back` of its parameters.

    Otherwise its entries are tensors in host memory, always at the same place. On the CPU everything is copied in the
    same way, to ordinary memory.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._group_of = {each: group for group in optimizer.param_groups for each in group["params"]}
        device = next(iter(self._group_of)).device
        self._host = HostMemory(is_pinned=device.type == "cuda")
        self._in_host: dict[tuple[Parameter, str], Tensor] = {}
        self._arriving: dict[Parameter, dict[str, Tensor]] = {}
        self._to_device, self._to_host = _Lane(device), _Lane(device)
        self._returned: dict[Parameter, Any] = {}  # the event behind the copy of its state to the host
        self._first: Sequence[Parameter] = ()
        self._followers: dict[Parameter, Sequence[Parameter]] = {}
        self._former: Sequence[Parameter] = ()

    def begin(self) -> None:
        """Begin an optimizer step: fetch what the last one began with."""
        self._former = ()
        self.fetch(self._first)

    def end(self) -> None:
        """End an optimizer step; what was fetched in vain is dropped."""
        self._arriving.clear()

    def fetch(self, parameters: Sequence[Parameter]) -> None:
        """Begin to copy the state of `parameters` to the device."""
        for parameter in parameters:
            if parameter not in self._arriving and parameter in self._optimizer.state:
                with self._to_device.copying(after=self._returned.get(parameter)):
                    self._arriving[parameter] = {
                        key: value.to(parameter.device, copy=True, non_blocking=True)
                        for key, value in self._moving(parameter)
                    }

    def bring_in_step(self, parameters: Sequence[Parameter]) -> None:
        """Bring the state of `parameters`, and fetch what followed them in the last step."""
        if self._former:
            self._followers[self._former[0]] = parameters
        else:
            self._first = parameters
        self._former = parameters
        self.bring(parameters)
        self._arriving.clear()  # what was fetched in vain, in a step of another order
        self.fetch(self._followers.get(parameters[0], ()))

    def bring(self, parameters: Sequence[Parameter]) -> None:
        """Let the optimizer have the state of `parameters` on the device."""
        self.fetch(parameters)
        self._to_device.wait()
        for parameter in parameters:
            arrived = self._arriving.pop(parameter, {})
            self._to_device.keep_for_computation(arrived.values())
            if arrived:
                self._optimizer.state[parameter].update(arrived)

    def put_back(self, parameters: Sequence[Parameter]) -> None:
        """Copy the state of `parameters` to the host, where the optimizer has it from now on."""
        with self._to_host.copying(after=self._to_host.mark_of_computation()):
            for parameter in parameters:
                for key, value in self._moving(parameter):
                    host = self._place(parameter, key, value)
                    self._to_host.keep(value)
                    host.copy_(value, non_blocking=True)
                    self._optimizer.state[parameter][key] = host
        self._returned.update(dict.fromkeys(parameters, self._to_host.mark()))

    def settle(self) -> None:
        """Wait until all state is in host memory: before somebody reads it."""
        self._to_host.finish()

    def _moving(self, parameter: Parameter) -> list[tuple[str, Tensor]]:
        """Return the entries of the state that move between device and host."""
        group = self._group_of[parameter]
        state = self._optimizer.state.get(parameter, {})
        entries = [(key, value) for key, value in state.items() if isinstance(value, Tensor)]
        return [(key, value) for key, value in entries if not stays_on_cpu(key, group)]

    def _place(self, parameter: Parameter, key: str, value: Tensor) -> Tensor:
        """Return where an entry lies in host memory."""
        host = self._in_host.get((parameter, key))
        if host is None or (host.shape, host.dtype) != (value.shape, value.dtype):
            host = self._in_host[parameter, key] = self._host.like(value)
        return host


class HostMemory:
    """Tensors in host memory, pinned or not, taken from large allocations."""

    def __init__(self, *, is_pinned: bool):
        self._is_pinned = is_pinned
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this shape and type whose storage holds nothing else, so that saving writes no more."""
        num_bytes = tensor.nbytes
        if num_bytes == 0:
            return torch.empty_like(tensor, device="cpu")
        if self._used + num_bytes > self._slab.nbytes:
            size = max(_SLAB, num_bytes)
            self._slab = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
            self._used = 0
        part = self._slab.numpy()[self._used : self._used + num_bytes]
        self._used += math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT
        return torch.from_numpy(part).view(tensor.dtype).view(tensor.shape)


class _Lane:
    """Copies in one direction, beside the computation: a stream on a GPU. On the CPU they are done at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def copying(self, *, after: Any) -> Iterator[None]:
        """Within the block, copies run in this lane, once the event `after` (None: at once) has happened."""
        if self._stream is None:
            yield
            return
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """Return an event that happens when what is in this lane by now has been copied."""
        return None if self._stream is None else self._stream.record_event()

    def mark_of_computation(self) -> Any:
        """Return an event that happens when what is to be computed by now has been."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        """Let the computation wait for what is in this lane by now."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def keep_for_computation(self, tensors: Any) -> None:
        """Keep the memory of tensors that arrived in this lane until the computation has used them."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor until this lane has copied it."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def finish(self) -> None:
        """Wait until everything in this lane has been copied."""
        if self._stream is not None:
            self._stream.synchronize()
