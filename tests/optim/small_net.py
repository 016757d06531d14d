"""A net with the kinds of weights that optimizers tell apart, and steps that move them."""

from collections.abc import Iterable
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad_norm_

from library.optim.chunk_exchange import ChunkExchange
from library.optim.fused_backward import FusedBackward
from library.optim.optimizer_probe import keys_in_bfloat16
from library.optim.optimizers import make_optimizer
from library.optim.options import OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper


class SmallNet(nn.Module):
    """A convolution and linear layers, of which one is used twice; the same weights each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [B, 16] of images [B, 3, H, W]."""
        features = self.first(self.convolution(images).mean(dim=(2, 3)).relu())
        return self.twice(self.twice(features).relu())


def take_steps(
    network: nn.Module,
    batches: Iterable[torch.Tensor],
    options: OptimizerOptions,
    rounding: str,
    *,
    fused: bool,
    chunk: int,
    exchange: ChunkExchange | None = None,
) -> None:
    """Take a step for each batch of images, in the backward pass if `fused` (then with `exchange`), else after it."""
    accelerator, parameters = Accelerator(cpu=True), list(network.parameters())
    optimizer = make_optimizer([{"name": "net", "params": parameters, "lr": options.learning_rate}], options)
    narrow = keys_in_bfloat16(partial(make_optimizer, options=options), torch.device("cpu"))
    stepper = Stepper(optimizer, Rounder(rounding, parameters, 0), narrow, elements_per_chunk=chunk)
    fused_backward = FusedBackward(stepper, options.max_grad_norm, exchange) if fused else None
    for step, images in enumerate(batches, 1):
        loss = network(images).float().square().mean()
        if fused_backward is not None:
            fused_backward.backward(accelerator, loss, step)
            assert all(parameter.grad is None for parameter in parameters), "each gradient has been freed"
            continue
        loss.backward()
        if options.max_grad_norm:
            clip_grad_norm_(parameters, options.max_grad_norm)
        stepper.step(step)
        optimizer.zero_grad()


def images_of(seeds: Iterable[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a batch of images [2, 3, 6, 6] for each seed."""
    return [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in seeds]


class BasicTransformerBlock(nn.Module):
    """A block with the name of those that are gathered together, two of whose weights have few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(16, 2)
        self.wide = nn.Linear(2, 16)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return features [B, 16] of features [B, 16]."""
        return features + self.wide(self.narrow(features).tanh())


class NetOfBlocks(SmallNet):
    """The small net with blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(BasicTransformerBlock(), BasicTransformerBlock())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [B, 16] of images [B, 3, H, W]."""
        features: torch.Tensor = self.blocks(super().forward(images))
        return features
