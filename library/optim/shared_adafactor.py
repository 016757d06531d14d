"""Adafactor's step for rows of weights whose other rows other processes have: two sums over all of them for a chunk.

The first sums the squares of the columns of matrices and the sizes of weights, the second the sizes of updates. What is
kept for the columns of a matrix is the same in all processes, everything else belongs to rows. The numbers are those of
whole weights but for the order of sums, with one difference: the mean over a matrix is that of its columns, whose
numbers every process has, in place of that of its rows, which is the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from library.optim.chunked_adafactor import prepare_state, relative_step_size
from library.optim.list_adafactor import Alike, alike_of, apply_update, flat, put, spread, take_factors
from library.optim.rounding import Rounder
from library.sdxl.device_copies import to_device

RMS = "RMS"
"""Key of the state, as in transformers: the root mean square of a weight before the last step."""

_COLUMNS = "exp_avg_sq_col"


class Parts(Protocol):
    """How processes share weights: each has some rows of every one, the first ones of it the first process."""

    def whole_shape(self, shard: Parameter) -> torch.Size:
        """Return the shape of the weight that has these rows."""

    def add_up(self, values: Tensor) -> None:
        """Add to `values`, in place, those that the processes with the other rows have."""


def belongs_to_rows(key: str, value: Tensor) -> bool:
    """Return whether an entry of a state has rows as its weight has; otherwise it is the same in all processes."""
    return value.ndim > (1 if key == _COLUMNS else 0)


def step_in_parts(
    parameters: Sequence[Parameter],
    group: Mapping[str, Any],
    state: Mapping[Any, dict[str, Any]],
    rounder: Rounder | None,
    parts: Parts,
) -> None:
    """Update rows of weights; every process that shares these weights calls it, with its rows of the same weights."""
    together: dict[tuple[int, torch.dtype], list[Parameter]] = {}
    for parameter in parameters:
        prepare_state(state[parameter], parameter, flatten=group["flatten_convolutions"])
        together.setdefault((state[parameter]["step"], parameter.dtype), []).append(parameter)
    for some in together.values():
        _Step(some, group, state, parts).take(rounder)


class _Step:
    """A step of rows of weights of one type, of which each has taken as many."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        group: Mapping[str, Any],
        state: Mapping[Any, dict[str, Any]],
        parts: Parts,
    ):
        self._group, self._parts = group, parts
        self._ordered = sorted(parameters, key=lambda each: tuple(parts.whole_shape(each)))
        self._states = [state[each] for each in self._ordered]
        flatten = group["flatten_convolutions"]
        self._alike = list(alike_of(self._ordered, state, parts.whole_shape, flatten=flatten))
        counts = torch.tensor([parts.whole_shape(each).numel() for each in self._ordered], dtype=torch.float32)
        self._counts = to_device(counts, self._ordered[0].device)

    def take(self, rounder: Rounder | None) -> None:
        """Update the weights and what is kept for them."""
        gradients = flat([each.grad for each in self._ordered if each.grad is not None])
        sizes = self._update_means(gradients)
        update = torch.empty_like(gradients)
        for each in self._alike:
            take_factors(each, each.of(update), mean_of=_COLUMNS)
        update.mul_(gradients)
        del gradients
        update.div_(spread(self._alike, self._clips(update)))
        rates, shrink = self._rates(sizes)
        update.mul_(rates)
        if self._group["beta1"] is not None:
            update = self._with_momentum(update, self._group["beta1"])
        is_narrow = self._ordered[0].dtype == torch.bfloat16
        kind = rounder.kind if rounder is not None and is_narrow else None
        apply_update(self._ordered, self._alike, update, shrink, kind, rounder)

    def _update_means(self, gradients: Tensor) -> Tensor | None:
        """Update the running means of squares; return the root mean squares of weights, if rates depend on them."""
        squares = gradients.square().add_(self._group["eps"][0])
        found: list[tuple[Alike, str, Tensor]] = []
        to_be_summed: list[Tensor] = []
        at = 0
        for each in self._alike:
            means = _means(each.of(squares), num_rows=self._parts.whole_shape(self._ordered[at])[0])
            found += [(each, name, mean) for name, mean in means.items()]
            to_be_summed += [means[_COLUMNS]] if _are_matrices(each) else []
            at += each.form[0]
        sizes = self._squares_of_weights() if self._group["scale_parameter"] else None
        self._add_up(to_be_summed if sizes is None else [*to_be_summed, sizes])
        beta2 = 1.0 - math.pow(self._states[0]["step"], self._group["decay_rate"])
        kept = [state[name] for each, name, _ in found for state in each.states]
        torch._foreach_mul_(kept, beta2)
        torch._foreach_add_(kept, [mean for _, _, means in found for mean in means.unbind()], alpha=1.0 - beta2)
        return None if sizes is None else sizes.sqrt_()

    def _squares_of_weights(self) -> Tensor:
        """Return what these rows add to the mean squares of whole weights."""
        norms = torch._foreach_norm([each.detach() for each in self._ordered], 2, dtype=torch.float32)
        return torch.stack(norms).square_().div_(self._counts)

    def _clips(self, update: Tensor) -> Tensor:
        """Return by what the update of each weight is divided: its root mean square, where that is above a limit."""
        norms = [torch.linalg.vector_norm(each.of(update).flatten(1), dim=1) for each in self._alike]
        squares = torch.cat(norms).square_().div_(self._counts)
        self._parts.add_up(squares)
        return squares.sqrt_().div_(self._group["clip_threshold"]).clamp_(min=1.0)

    def _rates(self, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the rate and the share of weights that is added to them: one number, or one for each of them."""
        group, step = self._group, self._states[0]["step"]
        rate, decay = relative_step_size(group, step) if group["relative_step"] else group["lr"], group["weight_decay"]
        if sizes is None:
            both = to_device(torch.tensor([rate, -decay * rate], dtype=torch.float32), self._counts.device)
            return both[0], both[1] if decay else None
        if group["relative_step"]:
            for state in self._states:
                state.setdefault(RMS, torch.zeros_like(sizes[0]))
            torch._foreach_copy_([state[RMS] for state in self._states], list(sizes.unbind()))
        rates = spread(self._alike, sizes.clamp(min=group["eps"][1]).mul_(rate))
        return rates, rates * -decay if decay else None

    def _with_momentum(self, update: Tensor, beta1: float) -> Tensor:
        """Update the running means of updates; return them."""
        for state, each in zip(self._states, self._ordered, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(each, dtype=torch.float32)
        kept = [state["exp_avg"].view(-1) for state in self._states]
        torch._foreach_mul_(kept, beta1)
        torch._foreach_add_(kept, update.split([each.numel() for each in kept]), alpha=1 - beta1)
        return flat(kept)

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add to tensors those of the other processes, by one sum for all of them."""
        if tensors:
            numbers = flat(tensors)
            self._parts.add_up(numbers)
            put(tensors, numbers)


def _are_matrices(alike: Alike) -> bool:
    return len(alike.form) == 3


def _means(squares: Tensor, *, num_rows: int) -> dict[str, Tensor]:
    """Return mean squares of rows of weights; what these rows add to those of columns, where others have the rest.

    `squares` is as the form of `Alike`, `num_rows` that of the whole weights.
    """
    if squares.ndim == 2:
        return {"exp_avg_sq": squares}
    columns = squares.mean(dim=-2) if squares.ndim > 3 else squares.sum(dim=-2).div_(num_rows)
    return {"exp_avg_sq_row": squares.mean(dim=-1), _COLUMNS: columns}
