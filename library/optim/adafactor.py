"""Adafactor near the speed of memory, rounding included (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235).

The numbers are those of transformers' class of the same name, which passes over each tensor about twenty times, once
per operation. Here three kernels do: mean squares, norm of the update, update with rounding.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from library.optim.chunked_adafactor import (
    ChunkedSteps,
    can_step_together,
    flattened_otherwise,
    may_step_together,
    relative_step_size,
)
from library.optim.kernels import compiled
from library.optim.options import KAHAN, STOCHASTIC
from library.optim.rounding import RESIDUAL, Rounder, stochastically_rounded, with_residual
from library.optim.shared_adafactor import RMS, Parts, belongs_to_rows, step_in_parts


class Adafactor(Optimizer):
    """Adafactor; arguments and state are those of transformers.

    The squares of gradients are kept as mean squares of rows and columns: of each matrix, and of each kernel (kH x kW)
    of a convolution, where they take 2/3 of the size of a 3x3 convolution in float32. With `flatten_convolutions` a
    convolution counts as one matrix [out, in * kH * kW], whose mean squares are negligible in size.

    With `relative_step` the rate follows from the step and `lr` has no effect; the state then holds the root mean
    square of the weights before the last step, as that of transformers does, for `rate_of_last_step`.

    `rounder`, if set, rounds updated bfloat16 weights; without one they are rounded to nearest. On a GPU the weights of
    a step are updated together (`chunked_adafactor`), and not at all where `is_finite`, if set, is false. With `parts`,
    if set, parameters are rows of weights that processes share (`shared_adafactor`).
    Raise `ValueError` for `warmup_init` without `relative_step`.
    """

    rounds_itself = True
    """It rounds bfloat16 weights within its own kernel, with the `rounder` that the stepper sets."""
    steps_in_parts = True
    """It steps rows of weights, with `parts`, though the update of a number depends on all of its weight."""
    belongs_to_rows = staticmethod(belongs_to_rows)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        flatten_convolutions: bool = False,
    ):
        if warmup_init and not relative_step:
            raise ValueError("warmup_init=True needs relative_step=True")
        settings = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "flatten_convolutions": flatten_convolutions,
        }
        super().__init__(params, settings)
        self.rounder: Rounder | None = None
        self.is_finite: Tensor | None = None
        self.parts: Parts | None = None
        self.chunked = ChunkedSteps()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if self.parts is not None:
                step_in_parts(parameters, group, self.state, self.rounder, self.parts)
                continue
            if parameters and can_step_together(parameters, group, self.state):
                self.chunked.step(parameters, group, self.state, self.rounder, self.is_finite)
                continue
            for parameter in parameters:
                assert parameter.grad is not None
                self._update(parameter, parameter.grad, group)
        return loss

    def decides_on_the_device(self) -> bool:
        """Return whether the next step can be told by `is_finite`, a tensor, that it is to change nothing."""
        return self.parts is None and all(may_step_together(group) for group in self.param_groups)

    def take_back_step(self) -> None:
        """Count one step less: the last one has changed nothing but the count."""
        for state in self.state.values():
            if state.get("step"):
                state["step"] -= 1

    def rate_of_last_step(self, group: dict[str, Any]) -> float | None:
        """Return the rate at which the first parameter of a group was updated, None before its first step.

        With `scale_parameter` this reads a number from the device.
        """
        state = self.state.get(group["params"][0], {})
        if "step" not in state or (group["scale_parameter"] and RMS not in state):
            return None
        size = relative_step_size(group, state["step"])
        return float(state[RMS].clamp(min=group["eps"][1]) * size) if group["scale_parameter"] else size

    def _update(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        shape = _rows_first(parameter.shape)
        held = parameter.data.contiguous()  # itself, unless its memory format is another one
        weights = held.view(shape)
        factors = _update_mean_squares(state, gradient, group)
        gradient = gradient.reshape(shape)
        scale, rate = None, group["lr"]
        if group["relative_step"]:
            rate = relative_step_size(group, state["step"])
        if group["scale_parameter"]:
            root_mean_square = _norm(weights) / weights.numel() ** 0.5
            scale = root_mean_square.clamp(min=group["eps"][1])
            if group["relative_step"]:
                state[RMS] = root_mean_square
        clip = _norm_of_update(gradient, factors) / weights.numel() ** 0.5 / group["clip_threshold"]
        _apply(
            weights,
            gradient,
            factors,
            clip=clip.clamp(min=1.0),
            scale=scale,
            rate=rate,
            weight_decay=group["weight_decay"],
            first_moment=_first_moment(state, parameter, group["beta1"]),
            beta1=group["beta1"] or 0.0,
            **self._rounding_of(parameter, state, shape),
        )
        if held.data_ptr() != parameter.data_ptr():
            parameter.data.copy_(held)

    def _rounding_of(self, parameter: Parameter, state: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the seed of stochastic rounding and the residual of compensated rounding, None if not used."""
        kind = self.rounder.kind if self.rounder is not None and parameter.dtype == torch.bfloat16 else None
        seed = residual = None
        if self.rounder is not None and kind == STOCHASTIC:
            seed = self.rounder.seed(parameter)
        if kind == KAHAN:
            if RESIDUAL not in state:
                state[RESIDUAL] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            residual = state[RESIDUAL].view(shape)
        return {"seed": seed, "residual": residual}


def _rows_first(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape as a vector or a matrix: the kernels are then compiled for two ranks only."""
    return tuple(shape) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _first_moment(state: dict[str, Any], parameter: Parameter, beta1: float | None) -> Tensor | None:
    if beta1 is None:
        return None
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    return state["exp_avg"].view(_rows_first(parameter.shape))


def _update_mean_squares(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Update the running means of squares; return the factors by which the gradient is multiplied."""
    eps = group["eps"][0]
    beta2 = 1.0 - math.pow(state["step"], group["decay_rate"])  # the paper, section 7.2
    if gradient.ndim < 2:
        [squares] = _running(state, beta2, exp_avg_sq=gradient.float().square() + eps)
        return [squares.rsqrt()]
    if gradient.ndim == 2 or group["flatten_convolutions"]:
        rows, columns = _mean_squares(gradient.reshape(_rows_first(gradient.shape)), eps)
    else:
        rows, columns = _mean_squares_of_kernels(gradient, eps)
    rows, columns = _running(state, beta2, exp_avg_sq_row=rows, exp_avg_sq_col=columns)
    factors = [(rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1), columns.rsqrt().unsqueeze(-2)]
    return factors if rows.ndim == 1 else [_outer(*factors).view(_rows_first(gradient.shape))]


def _running(state: dict[str, Any], beta2: float, **values: Tensor) -> list[Tensor]:
    """Update the running means of these names in `state` with `values`, and return them."""
    for name, value in values.items():
        if name not in state:
            state[name] = torch.zeros_like(value)
        elif state[name].shape != value.shape:
            raise flattened_otherwise()
        state[name].mul_(beta2).add_(value, alpha=1.0 - beta2)
    return [state[name] for name in values]


# -- kernels: each passes over the tensor once ------------------------------------------------------------------------


@compiled
def _mean_squares(gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean squares of rows [..., r] and columns [..., c] of matrices [..., r, c]."""
    squares = gradient.float().square() + eps
    return squares.mean(dim=-1), squares.mean(dim=-2)


@compiled
def _mean_squares_of_kernels(gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean squares of rows [o, i, h] and columns [o, i, w] of the kernels of a convolution [o, i, h, w].

    Written as sums of whole tensors: a reduction over three numbers is slower than all the rest.
    """
    *outer, height, width = gradient.shape
    squares = (gradient.float().square() + eps).reshape(-1, height * width)
    taps = [[squares[:, width * y + x] for x in range(width)] for y in range(height)]
    rows = torch.stack([sum(row[1:], start=row[0]) / width for row in taps], dim=-1)
    columns = torch.stack([sum(column[1:], start=column[0]) / height for column in zip(*taps, strict=True)], dim=-1)
    return rows.view(*outer, height), columns.view(*outer, width)


@compiled
def _outer(row_factors: Tensor, column_factors: Tensor) -> Tensor:
    """Return the product of factors [..., r, 1] and [..., 1, c]."""
    return row_factors * column_factors


@compiled
def _norm(weights: Tensor) -> Tensor:
    """Return the Euclidean norm of all weights, in float32."""
    return weights.float().norm(2)


@compiled
def _norm_of_update(gradient: Tensor, factors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of the update before it is clipped."""
    return _product(gradient, factors).norm(2)


@compiled
def _apply(
    weights: Tensor,
    gradient: Tensor,
    factors: list[Tensor],
    *,
    clip: Tensor,
    scale: Tensor | None,
    rate: float,
    weight_decay: float,
    first_moment: Tensor | None,
    beta1: float,
    seed: int | None,
    residual: Tensor | None,
) -> None:
    """Update `weights` in place, and `first_moment` and `residual` if there are any."""
    step_size = rate if scale is None else rate * scale
    update = _product(gradient, factors) / clip * step_size
    if first_moment is not None:
        first_moment.mul_(beta1).add_(update, alpha=1 - beta1)
        update = first_moment
    values = weights.float() if residual is None else weights.float() + residual.float()
    shrunk = _decayed(values, -weight_decay * rate) if scale is None else values - values * (weight_decay * step_size)
    values = shrunk - update
    if residual is not None:
        rounded, missing = with_residual(values)
        residual.copy_(missing)
        weights.copy_(rounded)
    else:
        weights.copy_(values if seed is None else stochastically_rounded(values, seed))


def _decayed(values: Tensor, share: float) -> Tensor:
    """Return `values` plus a share of them.

    Uncompiled with torch's `alpha`, as transformers does, which rounds once less; but a compiled kernel would have that
    number in its code, and be compiled again for every learning rate.
    """
    if torch.compiler.is_compiling():
        return values + values * share
    return torch.add(values, values, alpha=share)


def _product(gradient: Tensor, factors: list[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product * gradient.float()
