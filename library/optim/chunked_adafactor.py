"""Adafactor's step for a whole chunk of weights on a GPU: four launches of Triton's programs instead of a dozen each.

The numbers are those of the step weight by weight, but for the order of sums. Without Triton torch's functions of lists
do the same (`list_adafactor`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.config.errors import UserError
from library.optim import triton_launches
from library.optim.list_adafactor import step_by_lists
from library.optim.options import KAHAN, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder
from library.optim.step_tables import StepTables
from library.sdxl.device_copies import to_device

_MOST_DIMENSIONS = 4
_ALIGNMENT = 32  # numbers
_ROWS, _NUMBERS = "rows", "numbers"
_SEED = 5
"""Place of the seed in a row: that of `chunk_programs`, which needs Triton."""


def may_step_together(group: dict[str, Any]) -> bool:
    """Return whether the weights of a group lie on a GPU and have settings as in the recipes."""
    is_usual = not (group["scale_parameter"] or group["relative_step"]) and group["beta1"] is None
    return is_usual and bool(group["params"]) and group["params"][0].is_cuda


def can_step_together(parameters: Sequence[Parameter], group: dict[str, Any], state: Any) -> bool:
    """Return whether these weights, which have gradients, can be stepped by one table."""
    if not may_step_together(group):
        return False
    first = parameters[0]
    steps = {state[each].get("step", 0) if each in state else 0 for each in parameters}
    return (
        len(steps) == 1
        and first.dtype in (torch.bfloat16, torch.float32)
        and all(_is_plain(each, first) for each in parameters)
    )


def _is_plain(parameter: Parameter, first: Parameter) -> bool:
    gradient = parameter.grad
    assert gradient is not None
    return (
        parameter.dtype == gradient.dtype == first.dtype
        and parameter.dim() in (1, 2, _MOST_DIMENSIONS)
        and parameter.is_contiguous()
        and gradient.is_contiguous()
    )


@dataclass
class Layout:
    """What the programs work on for some weights, but for addresses and seeds: the same in every step."""

    rows: list[list[int]]  # of `parameters`, with zeros for what changes
    tiles: Tensor
    blocks: Tensor
    num_blocks: int
    num_scratch: int


def make_layout(shapes: Sequence[torch.Size], *, flatten: bool, device: torch.device) -> Layout:
    """Return the tiles of weights of these shapes, and where their sums lie in the scratch memory."""
    from library.optim import chunk_programs as programs

    forms = [_form(shape, flatten=flatten) for shape in shapes]
    rows: list[list[int]] = []
    tiles: list[tuple[int, int, int]] = []
    blocks: list[tuple[int, int, int]] = []
    used = sum(-(-height // programs.TILE_DOWN) * -(-width // programs.TILE_ACROSS) for _, height, width, _, _ in forms)
    for index, (kind, height, width, taps_down, taps_across) in enumerate(forms):
        down, across = -(-height // programs.TILE_DOWN), -(-width // programs.TILE_ACROSS)
        first, num_blocks, places = len(tiles), 0, (0, 0, 0)
        for row in range(0, down * programs.TILE_DOWN, programs.TILE_DOWN):
            tiles += [(index, row, column) for column in range(0, across * programs.TILE_ACROSS, programs.TILE_ACROSS)]
        if kind == programs.MATRIX.value:
            num_blocks = -(-height // programs.BLOCK)
            blocks += [(index, 0, start) for start in range(0, height, programs.BLOCK)]
            blocks += [(index, 1, start) for start in range(0, width, programs.BLOCK)]
            places = used, used + across * height, used + across * height + down * width
            used = places[-1] + -(-num_blocks // _ALIGNMENT) * _ALIGNMENT
        rows.append([*(0,) * 6, height, width, kind, down, across, first, *places, num_blocks, taps_down, taps_across])
    return Layout(rows, _table(tiles, device), _table(blocks, device), len(blocks), used)


def _form(shape: torch.Size, *, flatten: bool) -> tuple[int, int, int, int, int]:
    """Return kind, height and width of a weight, a table of numbers or of kernels, and height and width of these."""
    from library.optim import chunk_programs as programs

    if len(shape) == 1:
        width = min(programs.TILE_ACROSS, shape[0])
        if shape[0] % width == 0:
            return programs.VECTOR.value, shape[0] // width, width, 1, 1
        return programs.VECTOR.value, 1, shape[0], 1, 1
    if len(shape) == 2 or flatten:
        return programs.MATRIX.value, shape[0], math.prod(shape[1:]), 1, 1
    return programs.KERNELS.value, shape[0], shape[1], shape[2], shape[3]


def _table(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    return to_device(torch.tensor(rows or [(0, 0, 0)], dtype=torch.int64), device)


@dataclass(frozen=True)
class HeldChunk:
    """A chunk whose step is captured: its weights and their rows of the table, of which only the seeds will change."""

    key: tuple[int, int, bool]
    parameters: Sequence[Parameter]
    rows: Tensor
    kind: str | None


class ChunkedSteps:
    """Steps of an `Adafactor`, chunk by chunk; keeps the layout of each chunk on the device.

    `with_triton` says by which functions; None takes Triton's programs where they run.
    """

    def __init__(self, *, with_triton: bool | None = None) -> None:
        self._with_triton = with_triton
        self.tables = StepTables()
        self._held: list[HeldChunk] = []
        self._layouts: dict[tuple[int, int, bool], Layout] = {}

    def step(
        self,
        parameters: Sequence[Parameter],
        group: dict[str, Any],
        state: Any,
        rounder: Rounder | None,
        is_finite: Tensor | None,
    ) -> None:
        """Update `parameters`, of which `can_step_together` is true. Where `is_finite` (int32) is 0 nothing changes."""
        device, flatten = parameters[0].device, group["flatten_convolutions"]
        for parameter in parameters:
            prepare_state(state[parameter], parameter, flatten=flatten)
        kind = rounder.kind if rounder is not None and parameters[0].dtype == torch.bfloat16 else None
        key = id(parameters[0]), len(parameters), flatten
        numbers = self.tables.on_device((key, _NUMBERS), _numbers(group, state[parameters[0]]["step"]), device)
        if is_finite is None:
            is_finite = torch.ones((), dtype=torch.int32, device=device)
        if not (triton_launches.has_triton() if self._with_triton is None else self._with_triton):
            step_by_lists(parameters, group, state, kind, rounder, numbers, is_finite)
            return
        if key not in self._layouts:
            self._layouts[key] = make_layout([each.shape for each in parameters], flatten=flatten, device=device)
        layout = self._layouts[key]
        table = [
            [*_addresses(each, state[each], rounder, kind), *row[6:]]
            for each, row in zip(parameters, layout.rows, strict=True)
        ]
        content = torch.tensor(table, dtype=torch.int64)
        rows = self.tables.on_device((key, _ROWS), content, device)
        if self.tables.holds:
            self._held.append(HeldChunk(key, list(parameters), content, kind))
        _run(layout, rows, numbers, is_finite, narrow=parameters[0].dtype == torch.bfloat16, kind=kind)

    @contextmanager
    def holding(self, device: torch.device) -> Iterator[list[HeldChunk]]:
        """Within the block steps are launched but their tables not copied; yield the chunks, complete at its end.

        Each chunk must have been stepped before.
        """
        held: list[HeldChunk] = []
        self._held = held
        with self.tables.holding(device):
            yield held

    def advance(
        self, held: Sequence[HeldChunk], group_of: Mapping[Parameter, dict[str, Any]], state: Any, rounder: Rounder
    ) -> None:
        """Count a step of held chunks, which a graph is about to take, and write rates, decay and seeds for it."""
        for chunk in held:
            for parameter in chunk.parameters:
                state[parameter]["step"] += 1
            first = chunk.parameters[0]
            rows = chunk.rows.clone()
            if chunk.kind == STOCHASTIC:
                rows[:, _SEED] = torch.tensor([rounder.seed(parameter) for parameter in chunk.parameters])
            self.tables.change((chunk.key, _NUMBERS), _numbers(group_of[first], state[first]["step"]))
            self.tables.change((chunk.key, _ROWS), rows)
        self.tables.write()


def are_where_they_were(held: Sequence[HeldChunk], state: Any) -> bool:
    """Return whether the weights of held chunks and their means lie where they lay when a graph was captured."""
    return all(
        triton_launches.address_of(parameter.data) == weight and triton_launches.address_of(rows) == means
        for chunk in held
        for parameter, (weight, means) in zip(chunk.parameters, chunk.rows[:, [0, 2]].tolist(), strict=True)
        for rows in [_means_of_rows(state[parameter])]
    )


def _means_of_rows(state: dict[str, Any]) -> Tensor:
    rows: Tensor = state["exp_avg_sq"] if "exp_avg_sq" in state else state["exp_avg_sq_row"]
    return rows


def _run(layout: Layout, rows: Tensor, numbers: Tensor, is_finite: Tensor, *, narrow: bool, kind: str | None) -> None:
    from library.optim import chunk_programs as programs

    scratch = torch.empty(layout.num_scratch, dtype=torch.float32, device=rows.device)
    tile = {"NARROW": narrow, "DOWN": programs.TILE_DOWN, "ACROSS": programs.TILE_ACROSS}
    rounding = {STOCHASTIC: programs.AT_RANDOM, KAHAN: programs.WITH_RESIDUAL}.get(kind or "", programs.TO_NEAREST)
    num_tiles = len(layout.tiles)
    triton_launches.launch(programs.sums, num_tiles, rows, layout.tiles, numbers, is_finite, scratch, **tile)
    triton_launches.launch(
        programs.means, layout.num_blocks, rows, layout.blocks, numbers, is_finite, scratch, BLOCK=programs.BLOCK
    )
    triton_launches.launch(programs.norms, num_tiles, rows, layout.tiles, scratch, **tile)
    constants = {**tile, "ROUNDING": rounding.value, "BLOCK": programs.BLOCK}
    triton_launches.launch(programs.apply, num_tiles, rows, layout.tiles, numbers, is_finite, scratch, **constants)


def _numbers(group: dict[str, Any], step: int) -> Tensor:
    beta2 = 1.0 - math.pow(step, group["decay_rate"])
    rate = group["lr"]
    return torch.tensor([rate, -group["weight_decay"] * rate, beta2, group["eps"][0], group["clip_threshold"]])


def relative_step_size(group: Mapping[str, Any], step: int) -> float:
    """Return the rate of step `step` (from 1), before it is scaled by the size of the weights: the paper, section 8."""
    return min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))


def prepare_state(state: dict[str, Any], parameter: Parameter, *, flatten: bool) -> None:
    """Count the step, and make what the first one lacks: the same as weight by weight."""
    state["step"] = state.get("step", 0) + 1
    shape: tuple[int, ...] = tuple(parameter.shape)
    if len(shape) > 2 and flatten:
        shape = (shape[0], math.prod(shape[1:]))
    if len(shape) == 1:
        wanted: dict[str, tuple[int, ...]] = {"exp_avg_sq": shape}
    else:
        wanted = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
    for name, size in wanted.items():
        if name not in state:
            state[name] = torch.zeros(size, dtype=torch.float32, device=parameter.device)
        elif state[name].shape != size:
            raise flattened_otherwise()


def flattened_otherwise() -> UserError:
    """Return the error for a state whose means have the shapes of another `flatten_convolutions`."""
    return UserError(
        "the state to resume was saved with another flatten_convolutions of Adafactor.",
        "Pass the same --optimizer_args as then.",
    )


def _addresses(parameter: Parameter, state: dict[str, Any], rounder: Rounder | None, kind: str | None) -> list[int]:
    assert parameter.grad is not None
    if kind == KAHAN and RESIDUAL not in state:
        state[RESIDUAL] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    rows = _means_of_rows(state)
    columns = state.get("exp_avg_sq_col", rows)
    seed = rounder.seed(parameter) if rounder is not None and kind == STOCHASTIC else 0
    places = [triton_launches.address_of(each) for each in (parameter.data, parameter.grad, rows, columns)]
    return [*places, triton_launches.address_of(state[RESIDUAL]) if kind == KAHAN else 0, seed]
