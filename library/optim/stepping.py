"""How an optimizer moves the weights: a few at a time, with bfloat16 rounded well.

An optimizer is run on a part of the parameters by showing it a parameter group that holds only them. That is what makes
two things possible for every optimizer that treats each parameter by itself: a step in the middle of the backward pass,
and a float32 copy of the weights that lives only as long as they are moved.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.adafactor import RESIDUAL, Adafactor
from library.optim.rounding import KAHAN, NEAREST, Rounder, round_stochastically, with_residual

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""From parameter groups to the run's optimizer over them."""

_CHUNK = 2**23
"""Elements that are stepped together: enough to keep a GPU busy, few enough for their float32 copies to be small."""


@dataclass(eq=False)
class Chunk:
    """Parameters of one group of the optimizer (by its place) that are stepped together."""

    group: int
    parameters: list[Parameter]


class Stepper:
    """Steps `optimizer` chunk by chunk, rounding the weights that are bfloat16 as `rounder` says.

    `narrow_keys` are the parts of the optimizer's state to be held in bfloat16 where the weights are, as
    `keys_in_bfloat16` gives them. Chunks are of about `elements_per_chunk`; with `math.inf` all is stepped at once.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rounder: Rounder,
        narrow_keys: frozenset[str] = frozenset(),
        *,
        elements_per_chunk: float = _CHUNK,
    ):
        self.chunks = [
            Chunk(place, parameters)
            for place, group in enumerate(optimizer.param_groups)
            for parameters in _chunks_of(group["params"], elements_per_chunk)
        ]
        self._optimizer = optimizer
        self._rounder = rounder
        self._narrow_keys = narrow_keys
        self._all_at_once = math.isinf(elements_per_chunk)
        if isinstance(optimizer, Adafactor):
            optimizer.rounder = rounder  # it rounds within its own kernel

    def step(self, step: int) -> None:
        """Optimizer step number `step` (from 1): move all weights that have a gradient."""
        with self.stepping(step) as step_parameters:
            if self._all_at_once:
                step_parameters(self.chunks)
            else:
                for chunk in self.chunks:
                    step_parameters([chunk])

    @contextmanager
    def stepping(self, step: int) -> Iterator[Callable[[Sequence[Chunk]], None]]:
        """Optimizer step number `step`, done chunk by chunk in the block by calling what this gives.

        Each chunk finds the settings of its group as they were before the block, and what one of them makes of them
        holds after it: an optimizer that counts its steps there counts one.
        """
        self._rounder.start(step)
        groups = self._optimizer.param_groups
        before = [{**group} for group in groups]
        after: dict[int, dict[str, Any]] = {}

        def step_chunks(chunks: Sequence[Chunk]) -> None:
            shown: dict[int, dict[str, Any]] = {}
            for chunk in chunks:
                with_gradient = [parameter for parameter in chunk.parameters if parameter.grad is not None]
                if with_gradient:
                    group = shown.setdefault(chunk.group, {**before[chunk.group], "params": []})
                    group["params"] += with_gradient
            if shown:
                self._step_groups(list(shown.values()))
            for place, group in shown.items():
                after[place] = {name: value for name, value in group.items() if name != "params"}

        try:
            yield step_chunks
        finally:
            self._optimizer.param_groups = groups
            for place, settings in after.items():
                groups[place].update(settings)

    def _step_groups(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups
        rounds_here = self._rounder.kind != NEAREST and not isinstance(self._optimizer, Adafactor)
        narrow = [
            (parameter, parameter.data)
            for group in groups
            for parameter in group["params"]
            if rounds_here and parameter.dtype == torch.bfloat16
        ]
        for parameter, _ in narrow:
            self._widen(parameter)
        self._optimizer.step()
        for parameter, weights in narrow:
            self._narrow(parameter, weights)

    def _widen(self, parameter: Parameter) -> None:
        """Make weights, gradient and state float32."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        parameter.data = parameter.data.float()
        parameter.grad = gradient
        state = self._optimizer.state.get(parameter, {})
        if RESIDUAL in state:
            parameter.data += state.pop(RESIDUAL)
        for key in self._narrow_keys & state.keys():
            state[key] = state[key].float()

    def _narrow(self, parameter: Parameter, weights: Tensor) -> None:
        """Round what is now float32 back to bfloat16, the weights into `weights`, where they were."""
        state = self._optimizer.state[parameter]
        values, parameter.grad = parameter.data, None
        if self._rounder.kind == KAHAN:
            rounded, state[RESIDUAL] = with_residual(values)
        else:
            rounded = round_stochastically(values, self._rounder.seed(parameter))
        parameter.data = weights.copy_(rounded)
        for key in sorted(self._narrow_keys & state.keys()):
            state[key] = round_stochastically(state[key], self._rounder.seed(parameter, key))


def _chunks_of(parameters: Sequence[Parameter], elements: float) -> Iterator[list[Parameter]]:
    chunk: list[Parameter] = []
    for parameter in parameters:
        chunk.append(parameter)
        if sum(member.numel() for member in chunk) >= elements:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# -- what an optimizer is like, found out by trying it on a few numbers -----------------------------------------------


def keys_in_bfloat16(make: MakeOptimizer, device: torch.device) -> frozenset[str]:
    """What the optimizer keeps in bfloat16 for bfloat16 weights; to keep it in float32 would take twice the memory."""
    kept = state_beside_matrix(make, 80, torch.bfloat16, device).items()
    return frozenset(key for key, value in kept if value.dtype == torch.bfloat16)


def state_beside_matrix(make: MakeOptimizer, side: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps beside a matrix [side, side]; before its first step it has none to show."""
    parameter = _probe((side, side), dtype, device)
    optimizer = make([{"name": "probe", "params": [parameter], "lr": 1e-3}])
    optimizer.step()
    return {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def treats_each_alone(make: MakeOptimizer, device: torch.device) -> bool:
    """Whether a parameter moves the same, to the last bit, in whatever company it is stepped."""
    together, alone = (_after_a_few_steps(make, device, elements) for elements in (math.inf, 1))
    return all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def _after_a_few_steps(make: MakeOptimizer, device: torch.device, elements_per_chunk: float) -> list[Parameter]:
    parameters = [_probe(shape, torch.float32, device) for shape in ((6, 4), (5,), (3, 2, 3, 3))]
    optimizer = make([{"name": "probe", "params": parameters, "lr": 1.0}])  # those that find a rate expect 1
    stepper = Stepper(optimizer, Rounder(NEAREST, parameters, seed=0), elements_per_chunk=elements_per_chunk)
    for step in range(1, 13):  # one that finds a rate has found another one by then
        for scale, parameter in enumerate(parameters, start=1):
            parameter.grad = torch.full_like(parameter, 0.1 * step * scale)
        stepper.step(step)
    return parameters


def _probe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Parameter:
    values = torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device=device).view(shape)
    parameter = Parameter(values)
    parameter.grad = torch.ones_like(values)
    return parameter
