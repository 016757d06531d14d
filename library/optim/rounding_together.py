"""Tensors copied to float32 and rounded back to bfloat16 together: on a GPU one launch each, whatever their number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.optim import triton_launches
from library.optim.rounding import round_stochastically, with_residual
from library.sdxl.device_copies import to_device


@dataclass(frozen=True)
class Wide:
    """Float32 numbers to be rounded: at random by `seed`, or to nearest, keeping what is cut off, where it is None."""

    values: Tensor
    seed: int | None


@dataclass(frozen=True)
class Narrowed:
    """The numbers in bfloat16, and what was cut off if they were rounded to nearest."""

    values: Tensor
    residual: Tensor | None = None


def copies_in_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the tensors in float32."""
    copies = [torch.empty_like(each, dtype=torch.float32) for each in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class RoundingTogether:
    """Rounds as `round_stochastically` and `with_residual` do; keeps on the device which program takes which part."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, ...], Tensor] = {}

    def round(self, wide: Sequence[Wide]) -> list[Narrowed]:
        """Return each of them in bfloat16."""
        if not all(can_round_together(each.values) for each in wide):
            return [_rounded_alone(each) for each in wide]
        narrowed = [
            Narrowed(_narrow_like(each.values), _narrow_like(each.values) if each.seed is None else None)
            for each in wide
        ]
        self.launch(wide, narrowed)
        return narrowed

    def launch(self, wide: Sequence[Wide], narrowed: Sequence[Narrowed]) -> None:
        """Round into what `narrowed` holds, by one launch."""
        from library.optim import chunk_programs as programs

        if not wide:
            return
        device = wide[0].values.device
        sizes = tuple(each.values.numel() for each in wide)
        if sizes not in self._parts:
            starts = [(row, at) for row, size in enumerate(sizes) for at in range(0, size, programs.BLOCK)]
            self._parts[sizes] = to_device(torch.tensor(starts, dtype=torch.int64), device)
        address = triton_launches.address_of
        table = [
            (
                address(each.values),
                address(into.values),
                0 if into.residual is None else address(into.residual),
                each.seed or 0,
                each.values.numel(),
            )
            for each, into in zip(wide, narrowed, strict=True)
        ]
        parts = self._parts[sizes]
        rows = to_device(torch.tensor(table, dtype=torch.int64), device)
        triton_launches.launch(programs.round_all, len(parts), rows, parts, BLOCK=programs.BLOCK)


def can_round_together(values: Tensor) -> bool:
    """Return whether these numbers lie side by side on a GPU with Triton."""
    return values.is_cuda and values.is_contiguous() and triton_launches.has_triton()


def _narrow_like(values: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.bfloat16)


def _rounded_alone(wide: Wide) -> Narrowed:
    if wide.seed is None:
        return Narrowed(*with_residual(wide.values))
    return Narrowed(round_stochastically(wide.values, wide.seed))
