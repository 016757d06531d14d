"""Adafactor's step for a chunk of weights on a GPU without Triton: torch's functions of lists, and flat tensors.

Weights of one shape lie side by side in the flat tensors, so that one operation takes all of them. What changes from
step to step is read from tensors on the device, as in the programs of `chunk_programs`, whose numbers these are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.optim.options import KAHAN, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder, seed_of_part, stochastically_rounded, with_residual
from library.sdxl.device_copies import to_device


@dataclass(frozen=True)
class Alike:
    """Weights of one shape: which of all, their states, and their numbers as `form` in the flat tensors from `first`.

    A form is [n, c] of vectors, [n, r, c] of matrices and [n, o, i, r, c] of kernels.
    """

    states: Sequence[dict[str, Any]]
    first: int
    form: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Return their part of a flat tensor, as `form`."""
        return flat[self.first : self.first + math.prod(self.form)].view(self.form)


def step_by_lists(
    parameters: Sequence[Parameter],
    group: Mapping[str, Any],
    state: Mapping[Parameter, dict[str, Any]],
    kind: str | None,
    rounder: Rounder | None,
    numbers: Tensor,
    is_finite: Tensor,
) -> None:
    """Update `parameters`, whose states are prepared, rounding as `kind` says. Where `is_finite` is 0 nothing changes.

    `numbers` on the device begin with rate, minus decay times rate, and beta2.
    """
    rate, shrink, beta2, *_ = numbers.unbind()
    keeps = is_finite != 0
    ordered = sorted(parameters, key=lambda each: tuple(each.shape))
    gradients = flat([each.grad for each in ordered if each.grad is not None])
    gradients.masked_fill_(~keeps, 0.0)
    alike = list(alike_of(ordered, state, lambda each: each.shape, flatten=group["flatten_convolutions"]))
    _update_means(alike, gradients, torch.where(keeps, beta2, 1.0), group["eps"][0])
    update = torch.empty_like(gradients)
    for each in alike:
        take_factors(each, each.of(update))
    update.mul_(gradients)
    del gradients
    for each in alike:
        _clip(each.of(update).flatten(1), group["clip_threshold"])
    update.mul_(rate)
    apply_update(ordered, alike, update, shrink if group["weight_decay"] else None, kind, rounder, keeps)


def apply_update(
    ordered: Sequence[Parameter],
    alike: Sequence[Alike],
    update: Tensor,
    shrink: Tensor | None,
    kind: str | None,
    rounder: Rounder | None,
    keeps: Tensor | None = None,
) -> None:
    """Add to weights the share `shrink` of them, subtract `update` and round; where `keeps` is false nothing changes.

    `update` is flat, in the order of `alike`; its memory is used. `shrink` is one number, or one for each of them.
    """
    states = [state for each in alike for state in each.states]
    before = values = flat(ordered)
    residuals = [_residual(*each) for each in zip(ordered, states, strict=True)] if kind == KAHAN else []
    if residuals:
        values = before + flat(residuals)
    values = values if shrink is None else torch.addcmul(values, values, shrink)
    values = torch.sub(values, update, out=update)
    rounded: Tensor = values
    if kind == KAHAN:
        rounded, missing = with_residual(values)
        put(residuals, missing if keeps is None else torch.where(keeps, missing, flat(residuals).to(missing.dtype)))
    elif kind == STOCHASTIC:
        assert rounder is not None
        rounded = stochastically_rounded(values, _seeds(ordered, alike, rounder, values.device))
    put(ordered, rounded if keeps is None else torch.where(keeps, rounded, before.to(rounded.dtype)))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of all tensors in float32, side by side."""
    sizes = [each.numel() for each in tensors]
    numbers = torch.empty(sum(sizes), dtype=torch.float32, device=tensors[0].device)
    torch._foreach_copy_(list(numbers.split(sizes)), [each.detach().view(-1) for each in tensors])
    return numbers


def put(tensors: Sequence[Tensor], numbers: Tensor) -> None:
    """Copy the parts of a flat tensor to the tensors; from float32 to bfloat16 that rounds to nearest."""
    sizes = [each.numel() for each in tensors]
    torch._foreach_copy_([each.detach().view(-1) for each in tensors], list(numbers.split(sizes)))


def alike_of(
    ordered: Sequence[Parameter],
    state: Mapping[Parameter, dict[str, Any]],
    kind_of: Callable[[Parameter], tuple[int, ...]],
    *,
    flatten: bool,
) -> Iterator[Alike]:
    """Yield weights of one shape, side by side in the flat tensors; `kind_of` is the same for them alone."""
    first = 0
    for _, same in groupby(ordered, key=kind_of):
        some = list(same)
        shape, states = tuple(some[0].shape), [state[each] for each in some]
        form = (shape[0], math.prod(shape[1:])) if flatten and len(shape) > 1 else shape
        yield Alike(states, first, (len(states), *form))
        first += len(states) * math.prod(shape)


def spread(alike: Sequence[Alike], numbers: Tensor) -> Tensor:
    """Return a flat tensor with the number of its weight at each place."""
    wide = torch.empty(sum(math.prod(each.form) for each in alike), dtype=numbers.dtype, device=numbers.device)
    at = 0
    for each in alike:
        each.of(wide).flatten(1).copy_(numbers[at : at + each.form[0], None])
        at += each.form[0]
    return wide


def _update_means(alike: Sequence[Alike], gradients: Tensor, beta2: Tensor, eps: float) -> None:
    """Update the running means of squares."""
    squares = gradients.square().add_(eps)
    kept: list[Tensor] = []
    found: list[Tensor] = []
    for each in alike:
        block = each.of(squares)
        if len(each.form) == 2:
            means = {"exp_avg_sq": block}
        else:
            means = {"exp_avg_sq_row": block.mean(dim=-1), "exp_avg_sq_col": block.mean(dim=-2)}
        for name, mean in means.items():
            kept += [state[name] for state in each.states]
            found += mean.mul_(1.0 - beta2).unbind()
    torch._foreach_mul_(kept, beta2)
    torch._foreach_add_(kept, found)


def take_factors(alike: Alike, into: Tensor, mean_of: str = "exp_avg_sq_row") -> None:
    """Write the factors by which the gradients are multiplied.

    `mean_of` says whose mean is that of a matrix: rows and columns have the same, but for rounding.
    """
    if len(alike.form) == 2:
        torch.rsqrt(_stacked(alike, "exp_avg_sq"), out=into)
        return
    rows, columns = _stacked(alike, "exp_avg_sq_row"), _stacked(alike, "exp_avg_sq_col")
    of_matrices = rows if mean_of == "exp_avg_sq_row" else _stacked(alike, mean_of)
    rows.div_(of_matrices.mean(dim=-1, keepdim=True)).rsqrt_()
    torch.mul(rows.unsqueeze(-1), columns.rsqrt_().unsqueeze(-2), out=into)


def _stacked(alike: Alike, name: str) -> Tensor:
    return torch.stack([state[name] for state in alike.states])


def _clip(update: Tensor, threshold: float) -> None:
    """Divide the update of each weight, a row, by its root mean square, where that is above the threshold."""
    sizes = torch.linalg.vector_norm(update, dim=1, keepdim=True)
    update.div_(sizes.div_(update.shape[1] ** 0.5).div_(threshold).clamp_(min=1.0))


def _residual(parameter: Parameter, state: dict[str, Any]) -> Tensor:
    if RESIDUAL not in state:
        state[RESIDUAL] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    residual: Tensor = state[RESIDUAL]
    return residual


def _seeds(ordered: Sequence[Parameter], alike: Sequence[Alike], rounder: Rounder, device: torch.device) -> Tensor:
    """Return the seed of each number: with its place in the flat tensor it is rounded as in its weight."""
    seeds: list[int] = []
    first = 0
    for parameter in ordered:
        seeds.append(seed_of_part(rounder.seed(parameter), -first))
        first += parameter.numel()
    return spread(alike, to_device(torch.tensor(seeds, dtype=torch.int32), device))
