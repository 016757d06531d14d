"""Programs of Triton tried on a few numbers before a run relies on them: they must do what torch's functions do."""

import subprocess
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.optim.options import STOCHASTIC
from library.optim.rounding import Rounder, stochastically_rounded

_SHAPES = ((40, 300), (7,), (6, 5, 3, 3))
_RATE = 1e-2
_ONE_ROUNDING = 2**-7
"""The distance of two neighbours in bfloat16, as a share of the smaller one, is at most this."""


def why_not(device: torch.device) -> str | None:
    """Return why Triton's programs cannot be used on `device`, or None. Compiles them, which takes seconds."""
    if find_spec("triton") is None:
        return "it is not installed"
    from triton.errors import TritonError

    try:
        return _difference(device)
    except (TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _difference(device: torch.device) -> str | None:
    """Return what the programs compute otherwise than torch, or None."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(device)
    expected = stochastically_rounded(values, 7)
    if not torch.equal(_rounded(values, 7), expected):
        return "its program rounds to other numbers than torch on this GPU"
    if not all(map(_is_near, _stepped(device, with_triton=True), _stepped(device, with_triton=False))):
        return "its programs update weights to other numbers than torch on this GPU"
    for before, after in zip(_weights(device), _stepped(device, with_triton=True, is_finite=False), strict=False):
        if not torch.equal(before, after):
            return "its programs update weights although the loss is not finite"
    return None


def _rounded(values: Tensor, seed: int) -> Tensor:
    from library.optim.rounding_together import Narrowed, RoundingTogether, Wide

    narrowed = torch.empty_like(values, dtype=torch.bfloat16)
    RoundingTogether().launch([Wide(values, seed)], [Narrowed(narrowed)])
    return narrowed


def _weights(device: torch.device) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).bfloat16().to(device)) for shape in _SHAPES]


def _stepped(device: torch.device, *, with_triton: bool, is_finite: bool = True) -> list[Tensor]:
    """Return weights, and Adafactor's means, after a step."""
    from library.optim.adafactor import Adafactor
    from library.optim.chunked_adafactor import ChunkedSteps

    parameters = _weights(device)
    for parameter in parameters:
        parameter.grad = parameter.detach().flip(0).contiguous()
    optimizer = Adafactor(parameters, lr=_RATE, weight_decay=0.01, scale_parameter=False, relative_step=False)
    rounder, state = Rounder(STOCHASTIC, parameters, seed=0), optimizer.state
    steps = ChunkedSteps(with_triton=with_triton)
    decided = torch.tensor(int(is_finite), dtype=torch.int32, device=device)
    steps.step(parameters, optimizer.param_groups[0], state, rounder, decided)
    means: list[Any] = [value for each in parameters for value in state[each].values() if isinstance(value, Tensor)]
    return [*(parameter.detach() for parameter in parameters), *means]


def _is_near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=_ONE_ROUNDING, atol=0.0)
