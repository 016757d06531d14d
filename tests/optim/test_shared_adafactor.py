"""Adafactor's step for rows of weights in several processes, which are threads here, against that for whole weights."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from library.optim.adafactor import Adafactor
from library.optim.options import KAHAN, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder

SHAPES = ((7, 30), (7,), (8, 30), (6, 5, 3, 3), (7,), (4, 6, 1, 1), (1, 9), (7, 30))
"""Of the rows of most of them processes have different numbers, and of one with a single row one process has it all."""
RECIPE = {"scale_parameter": False, "relative_step": False}


class Together:
    """Sums over threads, one for each process."""

    def __init__(self, number: int):
        self._barrier = threading.Barrier(number, timeout=60)
        self._given: dict[int, Tensor] = {}
        self.num_sums = 0

    def add_up(self, place: int, values: Tensor) -> None:
        self._given[place] = values.clone()
        self._barrier.wait()
        total = torch.stack([self._given[each] for each in sorted(self._given)]).sum(dim=0)
        self._barrier.wait()
        values.copy_(total)
        self.num_sums += place == 0


class Rows:
    """The rows that one of the processes has of weights."""

    def __init__(self, weights: list[Tensor], number: int, place: int, together: Together):
        self._together, self._place = together, place
        each = [-(-len(weight) // number) for weight in weights]
        self._rows = [slice(place * count, (place + 1) * count) for count in each]
        self.parameters = [Parameter(rows.clone()) for rows in self.of(weights)]
        self._shapes = {part: weight.shape for part, weight in zip(self.parameters, weights, strict=True)}

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor[rows] for tensor, rows in zip(tensors, self._rows, strict=True)]

    def whole_shape(self, shard: Parameter) -> torch.Size:
        return self._shapes[shard]

    def add_up(self, values: Tensor) -> None:
        self._together.add_up(self._place, values)

    def first_element(self, shard: Parameter) -> int:
        shape = self._shapes[shard]
        return min(-(-shape[0] // self._together._barrier.parties) * self._place, shape[0]) * (
            shape.numel() // shape[0]
        )


def gradients_of(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def steps(parameters: list[Parameter], optimizer: Adafactor, part_of: Callable[[list[Tensor]], list[Tensor]]) -> None:
    for step in range(1, 4):
        if optimizer.rounder is not None:
            optimizer.rounder.start(step)
        gradients = gradients_of(step, parameters[0].dtype)
        for parameter, gradient in zip(parameters, part_of(gradients), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("settings", "dtype", "rounding"),
    [
        (RECIPE, torch.float32, None),
        ({**RECIPE, "weight_decay": 0.01, "flatten_convolutions": True, "clip_threshold": 0.7}, torch.float32, None),
        ({"scale_parameter": True, "relative_step": False, "beta1": 0.9, "weight_decay": 0.01}, torch.float32, None),
        ({"scale_parameter": True, "relative_step": True, "warmup_init": True}, torch.float32, None),
        (RECIPE, torch.bfloat16, STOCHASTIC),
        ({**RECIPE, "weight_decay": 0.01}, torch.bfloat16, KAHAN),
        (RECIPE, torch.bfloat16, None),
    ],
    ids=str,
)
def test_rows_move_as_whole_weights_do(number: int, settings: dict, dtype: torch.dtype, rounding: str | None):
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    whole = [Parameter(weight.clone()) for weight in weights]
    one = Adafactor(whole, lr=1e-2, **settings)
    one.rounder = None if rounding is None else Rounder(rounding, whole, seed=3)
    steps(whole, one, lambda tensors: tensors)
    together = Together(number)
    shared = [Rows(weights, number, place, together) for place in range(number)]
    optimizers = []
    for rows in shared:
        optimizers.append(Adafactor(rows.parameters, lr=1e-2, **settings))
        optimizers[-1].parts = rows
        if rounding is not None:
            optimizers[-1].rounder = Rounder(rounding, rows.parameters, 3, rows.first_element)
    threads = [
        threading.Thread(target=steps, args=(rows.parameters, optimizer, rows.of))
        for rows, optimizer in zip(shared, optimizers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.num_sums == 2 * 3, "two for each step"
    for place, parameter in enumerate(whole):
        pieces = [rows.parameters[place] for rows in shared]
        states = [optimizer.state[piece] for optimizer, piece in zip(optimizers, pieces, strict=True)]
        require_equal(parameter.detach(), torch.cat(pieces).detach(), dtype)
        assert one.state[parameter].keys() == states[0].keys()
        for key, kept in one.state[parameter].items():
            if not isinstance(kept, Tensor):
                assert all(state[key] == kept for state in states)
            elif optimizers[0].belongs_to_rows(key, kept):
                found = torch.cat([state[key] for state in states])
                require_equal(kept, found, torch.bfloat16 if key == RESIDUAL else torch.float32)
            else:
                for state in states:
                    require_equal(kept, state[key], torch.float32)


def require_equal(expected: Tensor, found: Tensor, dtype: torch.dtype) -> None:
    """Within the last bits of float32; of bfloat16 nearly all are equal, since one of those may round otherwise."""
    if dtype == torch.bfloat16:
        assert expected.shape == found.shape
        assert (expected == found).float().mean() > 0.98 or expected.numel() < 50
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)
    else:
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6 * float(expected.abs().max()))
