"""`--torch_compile`: the repeated blocks of the U-Net run as compiled kernels in training."""

import logging
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from library.config.errors import UserError
from library.optim.kernel_cache import with_whole_kernels
from library.optim.kernels import MAX_KERNELS, allow_kernels, why_not_compiled
from library.training.compile_options import CompileOptions

log = logging.getLogger(__name__)

REGIONS: tuple[type[nn.Module], ...] = (BasicTransformerBlock, ResnetBlock2D)
"""What is compiled: SDXL's U-Net spends nearly all of its time in 70 transformer blocks of 2 widths and 17 residual
blocks of 12. To compile the whole U-Net takes many minutes, and again for each size of image."""

_NOTEWORTHY_SECONDS = 1.0


def compile_regions(network: nn.Module, options: CompileOptions, device: torch.device) -> None:
    """Compile the repeated blocks of `network`, if the options ask for it.

    Blocks of one kind and width share their kernels. A second size of image compiles them once more, for any size.
    Without gradients (in sampling), and for sizes beyond `MAX_KERNELS`, the blocks run uncompiled. Names, weights and
    files of the network do not change. Raise `UserError` if no compiler works.
    """
    if not options.torch_compile:
        return
    _require_compiler(options.dynamo_backend, device)
    allow_kernels()
    log.info("torch.compile: the first step compiles kernels, which can take minutes")
    for kind in REGIONS:
        region = _Region(kind, options.dynamo_backend)
        for module in network.modules():
            if type(module) is kind:
                # A method, so that a deep copy of the network computes with its own weights.
                module.forward = MethodType(region.forward, module)
    network.register_forward_pre_hook(_WarmUp().look)


class _Region:
    """A kind of block, compiled and uncompiled."""

    def __init__(self, kind: type[nn.Module], backend: str):
        self._kind = kind
        # A whole graph: otherwise torch would leave out, in silence, what it cannot compile.
        self._compiled = with_whole_kernels(torch.compile(kind.forward, backend=backend, fullgraph=True))
        self._left_alone: set[tuple[int, torch.Size]] = set()

    def forward(self, module: nn.Module, hidden: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        """Return the output of `module`, compiled unless there is a reason against it."""
        key = (id(module), hidden.shape)
        if not torch.is_grad_enabled() or key in self._left_alone:
            return self._kind.forward(module, hidden, *arguments, **named)
        try:
            return self._compiled(module, hidden, *arguments, **named)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            if not self._left_alone:
                log.warning(
                    f"torch.compile: {self._kind.__name__} has been compiled {MAX_KERNELS} times, which is the limit. "
                    f"Further sizes, the first of them {list(hidden.shape)}, run uncompiled."
                )
            self._left_alone.add(key)
            return self._kind.forward(module, hidden, *arguments, **named)


class _WarmUp:
    """Logs how long compiling took, at the next forward pass."""

    def __init__(self) -> None:
        self._said_seconds = compiling_seconds()
        self._is_first = True

    def look(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Log the seconds since the last time; a hook before a forward pass."""
        seconds = compiling_seconds()
        if seconds - self._said_seconds > _NOTEWORTHY_SECONDS:
            again = "" if self._is_first else " for another size of image"
            log.info("torch.compile: %.0f s of compiling%s", seconds - self._said_seconds, again)
            self._said_seconds, self._is_first = seconds, False


def compiling_seconds() -> float:
    """Return how long this process has spent compiling."""
    return float(torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0))


def _require_compiler(backend: str, device: torch.device) -> None:
    """Raise `UserError` unless a small function can be compiled."""
    reason = why_not_compiled(device.type, backend)
    if reason is not None:
        compiler = "Triton (on Windows: triton-windows)" if device.type == "cuda" else "a C++ compiler (g++, MSVC)"
        raise UserError(
            f"--torch_compile does not work here ({reason}).", f"Install {compiler}, or remove --torch_compile."
        )
