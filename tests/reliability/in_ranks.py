"""What the processes of a test do together; each function is called in all of them, `call` of tests/forked_runs.py."""

import os
import sys
from importlib.metadata import version

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import sdxl_train
from library.optim.chunk_exchange import ChunkExchange
from library.optim.fused_backward import FusedBackward
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.training import resume
from tests.optim.small_net import SmallNet, images_of, take_steps

RECIPE = ADAFACTOR_RECIPE.split()[1:]
CHUNK = 150


def _trained(options: OptimizerOptions, dtype: torch.dtype, rounding: str, *, fused: bool) -> list[torch.Tensor]:
    """The weights after steps on the images of all processes: with DDP and a step, or in the fused backward pass."""
    net = SmallNet().to(dtype)
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = images_of((step * world + rank for step in range(1, 5)), dtype)
    if fused:
        take_steps(net, batches, options, rounding, fused=True, chunk=CHUNK, exchange=ChunkExchange())
    else:
        take_steps(nn.parallel.DistributedDataParallel(net), batches, options, rounding, fused=False, chunk=CHUNK)
    return [parameter.detach().clone() for parameter in net.parameters()]


def fused_as_ddp() -> None:
    """Every optimizer moves the weights to the same bits, in the fused backward pass and after DDP's."""
    Accelerator(cpu=True)
    for optimizer_type in ("torch.optim.SGD", "AdamW", "Adafactor"):
        for max_grad_norm in (0.0, 0.05):
            for dtype, rounding in ((torch.float32, NEAREST), (torch.bfloat16, STOCHASTIC)):
                options = OptimizerOptions(
                    optimizer_type=optimizer_type,
                    optimizer_args=RECIPE if optimizer_type == "Adafactor" else [],
                    learning_rate=0.1 if optimizer_type == "torch.optim.SGD" else 1e-2,
                    max_grad_norm=max_grad_norm,
                )
                usual, fused = (_trained(options, dtype, rounding, fused=fused) for fused in (False, True))
                before = SmallNet().to(dtype).parameters()
                assert not any(map(torch.equal, usual, before)), "every weight has moved"
                for one, other in zip(usual, fused, strict=True):
                    assert torch.equal(one, other), (optimizer_type, max_grad_norm, dtype)
    dist.destroy_process_group()


def train_in_folder(folder: str, *argv: str) -> None:
    """Each process trains in a folder of its number: the paths are the same, what lies there need not be.

    One has another release of torch, if its environment says so.
    """
    os.chdir(f"{folder}/{os.environ['RANK']}")
    release = os.environ.get("RELEASE_OF_TORCH")
    if release is not None:
        resume.version = lambda library: release if library == "torch" else version(library)
    sys.exit(sdxl_train.main(argv))


def not_a_number_in_one() -> None:
    """A loss that is NaN in one process moves nothing in any, and nobody waits for the others."""
    accelerator, net = Accelerator(cpu=True), SmallNet()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = make_optimizer([{"name": "net", "params": list(net.parameters()), "lr": 1.0}], OptimizerOptions())
    fused = FusedBackward(Stepper(optimizer, Rounder(NEAREST, net.parameters(), 0)), 1.0, ChunkExchange())
    loss = net(torch.ones(1, 3, 6, 6)).mean() * (float("nan") if dist.get_rank() else 1.0)
    mean = accelerator.reduce(loss.detach().clone(), reduction="mean")
    assert fused.backward(accelerator, loss, 1, lambda: float(mean)) is None
    assert all(map(torch.equal, before, net.parameters()))
    dist.destroy_process_group()
