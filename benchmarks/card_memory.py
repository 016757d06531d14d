"""The GPU memory of a training step, by arithmetic: weights, gradients, optimizer state, activations.

    python benchmarks/card_memory.py [--batch_sizes 1 2 4 8] [--resolution 1024]

Nothing is measured and no GPU is needed: shapes pass through the U-Net without any computation. Activations are counted
in bfloat16; autocast keeps the norms in float32, all of them within a block, whose share is doubled for that. Not
counted: the CUDA context (about 0.5 GiB) and the fragmentation of the allocator.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch
from torch import nn

from benchmarks.random_model import unet_inputs
from library.optim.options import NEAREST
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.sdxl.architecture import SDXL_BASE, empty_model, empty_unet

_FLOAT32_WITHIN_BLOCKS = 2
OFFLOADED_CHUNKS = 3
"""Whose state is on the GPU at once with `--offload_optimizer`: what arrives, what is updated, what returns."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, and bytes within the largest checkpointed block."""

    kept: int
    largest_block: int


class _Kept:
    """Tensors that autograd keeps, each storage once, without the weights."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage
        return tensor

    @contextmanager
    def listening(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield


class _FlashAttention(torch.autograd.Function):
    """Attention as a GPU computes it, which does not keep the matrix of all pairs; on the meta device it would."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(query)
        context.save_for_backward(query, key, value, result)
        return result


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
    return _FlashAttention.apply(query, key, value)


def activations(resolution: int, batch_size: int, *, checkpointing: bool) -> Activations:
    """Return the activations of SDXL's U-Net in bfloat16, for square images."""
    unet = nn.Module.to(empty_unet(SDXL_BASE), torch.bfloat16).train()  # diffusers' own `to` warns
    kept, blocks = _Kept(), []

    def checkpointed(module: nn.Module, *arguments: Any) -> Any:
        within = _Kept()
        with within.listening():
            output = module(*arguments)
        blocks.append(within.num_bytes)
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                kept.add(argument)
        return output

    if checkpointing:
        unet.enable_gradient_checkpointing(checkpointed)
    inputs = unet_inputs(SDXL_BASE, resolution, resolution, batch_size, torch.bfloat16)
    with kept.listening(), patch("torch.nn.functional.scaled_dot_product_attention", _attention):
        unet(**inputs)
    return Activations(kept.num_bytes, max(blocks, default=0))


def adafactor_bytes(parameters: Sequence[nn.Parameter], *, flatten_convolutions: bool) -> int:
    """Return the size of Adafactor's state in float32: mean squares of rows and columns, of vectors each square."""
    total = 0
    for parameter in parameters:
        shape = parameter.shape
        if parameter.dim() == 4 and flatten_convolutions:
            shape = torch.Size((shape[0], shape[1:].numel()))
        count = shape.numel()
        total += count if len(shape) < 2 else count // shape[-1] + count // shape[-2]
    return 4 * total


def largest_chunk(parameters: Sequence[nn.Parameter]) -> int:
    """Return the elements of the largest group of weights that are updated together."""
    stepper = Stepper(torch.optim.SGD(parameters), Rounder(NEAREST, parameters, seed=0))
    return max(sum(parameter.numel() for parameter in chunk.parameters) for chunk in stepper.chunks)


def parts(resolution: int, batch_sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield the name and the bytes of each part."""
    model = empty_model(SDXL_BASE)
    parameters = list(model.unet.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    yield "U-Net, weights in bfloat16", 2 * count
    for name, network in (("L", model.text_encoder_l), ("G", model.text_encoder_g), ("VAE", model.vae)):
        yield f"{name}, weights in bfloat16", 2 * sum(parameter.numel() for parameter in network.parameters())
    yield "gradients in bfloat16", 2 * count
    yield "largest gradient (--fused_backward_pass)", 2 * max(parameter.numel() for parameter in parameters)
    yield "Adafactor", adafactor_bytes(parameters, flatten_convolutions=False)
    yield "Adafactor, flatten_convolutions=True", adafactor_bytes(parameters, flatten_convolutions=True)
    yield "AdamW, state in bfloat16 as the weights", 4 * count
    yield "AdamW with --offload_optimizer: on the GPU", 4 * OFFLOADED_CHUNKS * largest_chunk(parameters)
    yield "AdamW8bit", 2 * count
    yield "Kahan's compensation (--bf16_rounding=kahan)", 2 * count
    yield "float32 in place of bfloat16: weights and gradients", 8 * count
    for batch_size in batch_sizes:
        found = activations(resolution, batch_size, checkpointing=True)
        total = found.kept + _FLOAT32_WITHIN_BLOCKS * found.largest_block
        yield f"activations, batch of {batch_size}, checkpointing", total
        whole = activations(resolution, batch_size, checkpointing=False).kept
        yield f"activations, batch of {batch_size}", whole


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--resolution", type=int, default=1024)
    arguments = parser.parse_args(argv)
    for name, num_bytes in parts(arguments.resolution, arguments.batch_sizes):
        print(f"{name:52} {num_bytes / 2**30:7.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
