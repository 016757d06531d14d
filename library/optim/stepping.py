"""How an optimizer updates the weights: a few at a time, with bfloat16 rounded well.

An optimizer runs on a part of the parameters when it is shown a parameter group that holds only them. For every
optimizer that treats each parameter separately this allows two things: a step in the middle of the backward pass, and
a float32 copy of the weights that lives only while they are updated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.offloaded_states import OffloadedStates
from library.optim.options import KAHAN, NEAREST
from library.optim.rounding import RESIDUAL, Rounder, round_stochastically, with_residual

_CHUNK = 2**23
"""Elements that are stepped together: enough to keep a GPU busy, few enough for their float32 copies to be small."""


@dataclass(eq=False)
class Chunk:
    """Parameters of one group of the optimizer (by its place) that are stepped together."""

    group: int
    parameters: list[Parameter]


class ChunkSteps:
    """One optimizer step, taken chunk by chunk.

    Each chunk sees the settings of its group as they were before the step, and the changes made by one of them hold
    after it: an optimizer that counts its steps there counts one.
    """

    def __init__(self, settings: list[dict[str, Any]], step_groups: Callable[[list[dict[str, Any]]], None]):
        self._settings = settings
        self._step_groups = step_groups
        self.changed_settings: dict[int, dict[str, Any]] = {}

    def step(self, chunks: Sequence[Chunk]) -> None:
        """Update the weights of `chunks` that have a gradient, together."""
        shown: dict[int, dict[str, Any]] = {}
        for chunk in chunks:
            with_gradient = [parameter for parameter in chunk.parameters if parameter.grad is not None]
            if with_gradient:
                group = shown.setdefault(chunk.group, {**self._settings[chunk.group], "params": []})
                group["params"] += with_gradient
        if shown:
            self._step_groups(list(shown.values()))
        for place, group in shown.items():
            self.changed_settings[place] = {name: value for name, value in group.items() if name != "params"}


class Stepper:
    """Steps `optimizer` chunk by chunk and rounds bfloat16 weights with `rounder`.

    `narrow_keys` are the keys of the optimizer's state to be kept in bfloat16 beside bfloat16 weights, as
    `keys_in_bfloat16` returns them. Chunks are of about `elements_per_chunk`; with `math.inf` all is stepped at once.
    With `offloads` the optimizer's state lies in host memory between the updates.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rounder: Rounder,
        narrow_keys: frozenset[str] = frozenset(),
        *,
        elements_per_chunk: float = _CHUNK,
        offloads: bool = False,
    ):
        self.chunks = [
            Chunk(place, parameters)
            for place, group in enumerate(optimizer.param_groups)
            for parameters in _chunks_of(group["params"], elements_per_chunk)
        ]
        self._optimizer = optimizer
        self._rounder = rounder
        self._narrow_keys = narrow_keys
        self._offloaded = OffloadedStates(optimizer) if offloads else None
        self._all_at_once = math.isinf(elements_per_chunk)
        self._rounds_itself = getattr(optimizer, "rounds_itself", False)
        if self._rounds_itself:  # within its own kernel
            optimizer.rounder = rounder  # type: ignore[attr-defined]

    def step(self, step: int) -> None:
        """Take optimizer step `step` (from 1): update all weights that have a gradient."""
        with self.stepping(step) as chunk_steps:
            if self._all_at_once:
                chunk_steps.step(self.chunks)
            else:
                for chunk in self.chunks:
                    chunk_steps.step([chunk])

    @contextmanager
    def stepping(self, step: int) -> Iterator["ChunkSteps"]:
        """Within the block, take optimizer step `step` chunk by chunk, by calling what is yielded."""
        self._rounder.start(step)
        if self._offloaded is not None:
            self._offloaded.begin()
        groups = self._optimizer.param_groups
        chunk_steps = ChunkSteps([{**group} for group in groups], self._step_groups)
        try:
            yield chunk_steps
        finally:
            self._optimizer.param_groups = groups
            for place, settings in chunk_steps.changed_settings.items():
                groups[place].update(settings)
            if self._offloaded is not None:
                self._offloaded.end()

    def with_states(self, function: Callable[[], object]) -> None:
        """Call `function`, a method of the optimizer that reads its state: once, or for each chunk if it is offloaded.

        As in a step, each chunk sees the settings of its group as they were before.
        """
        if self._offloaded is None:
            function()
            return
        groups, changed = self._optimizer.param_groups, {}
        try:
            for chunk in self.chunks:
                shown = {**groups[chunk.group], "params": chunk.parameters}
                self._optimizer.param_groups = [shown]
                self._offloaded.bring(chunk.parameters)
                function()
                self._offloaded.put_back(chunk.parameters)
                changed[chunk.group] = {name: value for name, value in shown.items() if name != "params"}
        finally:
            self._optimizer.param_groups = groups
            for place, settings in changed.items():
                groups[place].update(settings)

    @property
    def decides_on_device(self) -> bool:
        """Whether the optimizer can be told on the device that a step is to change nothing."""
        return self._rounds_itself and self._optimizer.decides_on_the_device()  # type: ignore[attr-defined]

    @contextmanager
    def only_if(self, is_finite: torch.Tensor) -> Iterator[None]:
        """Within the block, steps change nothing where `is_finite` is false; the host does not look."""
        self._optimizer.is_finite = is_finite.to(torch.int32)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._optimizer.is_finite = None  # type: ignore[attr-defined]

    def take_back_step(self) -> None:
        """Count one step less, after one that has changed nothing on the device."""
        self._optimizer.take_back_step()  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Wait until the optimizer's state can be read."""
        if self._offloaded is not None:
            self._offloaded.settle()

    @property
    def offloads(self) -> bool:
        """Whether the state lies in host memory between the updates."""
        return self._offloaded is not None

    def _step_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._offloaded is None:
            self._update(groups)
            return
        parameters = [parameter for group in groups for parameter in group["params"]]
        self._offloaded.bring_in_step(parameters)
        self._update(groups)
        self._offloaded.put_back(parameters)

    def _update(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups
        rounds_here = self._rounder.kind != NEAREST and not self._rounds_itself
        stand_ins: dict[Parameter, Parameter] = {}
        for group in groups if rounds_here else []:
            narrow = [parameter for parameter in group["params"] if parameter.dtype == torch.bfloat16]
            stand_ins |= {parameter: self._widened(parameter) for parameter in narrow}
            group["params"] = [stand_ins.get(parameter, parameter) for parameter in group["params"]]
        self._optimizer.step()
        for parameter, stand_in in stand_ins.items():
            self._narrow(parameter, stand_in)

    def _widened(self, parameter: Parameter) -> Parameter:
        """Return a float32 stand-in for a bfloat16 parameter, which takes its state over; its gradient is freed.

        To change the type of the parameter itself would make DDP lose it: it would no longer notice its gradient.
        """
        assert parameter.grad is not None
        stand_in = Parameter(parameter.detach().float())
        stand_in.__dict__.update(parameter.__dict__)
        stand_in.grad, parameter.grad = parameter.grad.float(), None
        if parameter in self._optimizer.state:
            state = self._optimizer.state[stand_in] = self._optimizer.state.pop(parameter)
            if RESIDUAL in state:
                stand_in.data += state.pop(RESIDUAL)
            for key in self._narrow_keys & state.keys():
                state[key] = state[key].float()
        return stand_in

    def _narrow(self, parameter: Parameter, stand_in: Parameter) -> None:
        """Round what its stand-in has become back to bfloat16, weights and state."""
        state = self._optimizer.state[parameter] = self._optimizer.state.pop(stand_in, {})
        values = stand_in.data
        if self._rounder.kind == KAHAN:
            rounded, state[RESIDUAL] = with_residual(values)
        else:
            rounded = round_stochastically(values, self._rounder.seed(parameter))
        parameter.data.copy_(rounded)
        for key in sorted(self._narrow_keys & state.keys()):
            state[key] = round_stochastically(state[key], self._rounder.seed(parameter, key))


def _chunks_of(parameters: Sequence[Parameter], elements: float) -> Iterator[list[Parameter]]:
    chunk: list[Parameter] = []
    held = 0
    for parameter in parameters:
        chunk.append(parameter)
        held += parameter.numel()
        if held >= elements:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
