"""How an optimizer updates the weights: a few at a time, with bfloat16 rounded well.

An optimizer runs on a part of the parameters when it is shown a parameter group that holds only them. For every
optimizer that treats each parameter separately this allows two things: a step in the middle of the backward pass, and
a float32 copy of the weights that lives only while they are updated.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.chunked_adafactor import ChunkedSteps, HeldChunk
from library.optim.offloaded_states import OffloadedStates
from library.optim.options import KAHAN, NEAREST
from library.optim.rounding import RESIDUAL, Rounder
from library.optim.rounding_together import RoundingTogether, Wide, copies_in_float32
from library.optim.unwaiting import without_waits

_CHUNK = 2**23
"""Elements that are stepped together: enough to keep a GPU busy, few enough for their float32 copies to be small."""


_WIDENED_AT_ONCE = 64
"""Weights whose float32 copies are made and rounded together; what they replace is freed before the next ones are."""


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
    With `offloads` the optimizer's state lies in host memory between the updates. `size_of` returns the elements of a
    parameter that count: processes that share weights have to agree on the chunks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rounder: Rounder,
        narrow_keys: frozenset[str] = frozenset(),
        *,
        elements_per_chunk: float = _CHUNK,
        offloads: bool = False,
        size_of: Callable[[Parameter], int] = Parameter.numel,
    ):
        self.chunks = [
            Chunk(place, parameters)
            for place, group in enumerate(optimizer.param_groups)
            for parameters in _chunks_of(group["params"], elements_per_chunk, size_of)
        ]
        self._optimizer = optimizer
        self._rounder = rounder
        self._narrow_keys = narrow_keys
        self._offloaded = OffloadedStates(optimizer) if offloads else None
        self._all_at_once = math.isinf(elements_per_chunk)
        self._together = RoundingTogether()
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

    @contextmanager
    def holding(self, device: torch.device) -> Iterator[list[HeldChunk]]:
        """Within the block, which captures a step, tables of the step are not copied; yield what `advance` takes."""
        chunked: ChunkedSteps = self._optimizer.chunked  # type: ignore[attr-defined]
        with chunked.holding(device) as held:
            yield held
        chunked.tables.write()

    def advance(self, step: int, held: Sequence[HeldChunk]) -> None:
        """Count step `step`, which a graph is about to take, and write what it reads."""
        self._rounder.start(step)
        group_of = {each: group for group in self._optimizer.param_groups for each in group["params"]}
        chunked: ChunkedSteps = self._optimizer.chunked  # type: ignore[attr-defined]
        chunked.advance(held, group_of, self._optimizer.state, self._rounder)

    @property
    def states(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """The optimizer's state of each weight."""
        return self._optimizer.state

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
        parameters = [parameter for group in groups if rounds_here for parameter in group["params"]]
        narrow = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
        stand_ins: dict[Parameter, Parameter] = {}
        for some in _some_at_once(narrow):
            stand_ins |= self._widened(some)
        for group in groups if stand_ins else []:
            group["params"] = [stand_ins.get(parameter, parameter) for parameter in group["params"]]
        with without_waits(self._optimizer):
            self._optimizer.step()
        for some in _some_at_once(narrow):
            self._narrow({parameter: stand_ins[parameter] for parameter in some})

    def _widened(self, parameters: Sequence[Parameter]) -> dict[Parameter, Parameter]:
        """Return float32 stand-ins for bfloat16 parameters, which take their states over; their gradients are freed.

        To change the type of the parameters themselves would make DDP lose them: it would no longer notice gradients.
        """
        states: list[dict[str, Any]] = [self._optimizer.state.pop(each, {}) for each in parameters]
        places = [(state, key) for state in states for key in sorted((self._narrow_keys | {RESIDUAL}) & state.keys())]
        weights, gradients = [each.detach() for each in parameters], [_gradient(each) for each in parameters]
        wide = copies_in_float32([*weights, *gradients, *(state[key] for state, key in places)])
        for (state, key), value in zip(places, wide[2 * len(parameters) :], strict=True):
            state[key] = value
        stand_ins: dict[Parameter, Parameter] = {}
        for index, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            stand_in = stand_ins[parameter] = Parameter(wide[index])
            stand_in.__dict__.update(parameter.__dict__)
            stand_in.grad, parameter.grad = wide[len(parameters) + index], None
            if RESIDUAL in state:
                stand_in.data += state.pop(RESIDUAL)
            if state:
                self._optimizer.state[stand_in] = state
        return stand_ins

    def _narrow(self, stand_ins: Mapping[Parameter, Parameter]) -> None:
        """Round what stand-ins have become back to bfloat16, weights and states."""
        wide: list[Wide] = []
        places: list[tuple[Parameter, str | None]] = []
        for parameter, stand_in in stand_ins.items():
            state = self._optimizer.state[parameter] = self._optimizer.state.pop(stand_in, {})
            wide.append(Wide(stand_in.data, None if self._rounder.kind == KAHAN else self._rounder.seed(parameter)))
            places.append((parameter, None))
            for key in sorted(self._narrow_keys & state.keys()):
                wide.append(Wide(state[key], self._rounder.seed(parameter, key)))
                places.append((parameter, key))
        rounded = self._together.round(wide)
        weights = [(parameter, each) for (parameter, key), each in zip(places, rounded, strict=True) if key is None]
        torch._foreach_copy_([parameter.data for parameter, _ in weights], [each.values for _, each in weights])
        for (parameter, key), each in zip(places, rounded, strict=True):
            if key is not None:
                self._optimizer.state[parameter][key] = each.values
            elif each.residual is not None:
                self._optimizer.state[parameter][RESIDUAL] = each.residual


def _gradient(parameter: Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _some_at_once(parameters: Sequence[Parameter]) -> Iterator[Sequence[Parameter]]:
    return (parameters[at : at + _WIDENED_AT_ONCE] for at in range(0, len(parameters), _WIDENED_AT_ONCE))


def _chunks_of(
    parameters: Sequence[Parameter], elements: float, size_of: Callable[[Parameter], int]
) -> Iterator[list[Parameter]]:
    chunk: list[Parameter] = []
    held = 0
    for parameter in parameters:
        chunk.append(parameter)
        held += size_of(parameter)
        if held >= elements:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
