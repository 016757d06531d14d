"""Every optimizer that has a name: it learns, resumes bit for bit, steps in the backward pass where it can, and rounds
bfloat16 without bias."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from library.optim.fused_backward import FusedBackward
from library.optim.known_optimizers import OPTIMIZERS, PRODIGY_PLUS, OptimizerKind
from library.optim.optimizer_probe import keys_in_bfloat16, treats_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.training.progress import Progress, Setting
from library.training.resumable import Resumable, group_settings
from library.training.state import read_learnt, write_state
from tests.optim.small_net import SmallNet

CPU = torch.device("cpu")
PROGRESS = Progress("2026-02-03T04:05:06", 7, 3, 1, 1, [0.1], setting=Setting({"output_name": "m"}, {}, {}))
# Those that find a rate begin with one of 1e-6: a few steps are too few to find another.
FINDING = ["d0=3e-4", "growth_rate=1.02"]
ARGS = {
    "Adafactor": ADAFACTOR_RECIPE.split()[1:],
    "RAdamScheduleFree": ["silent_sgd_phase=False"],
    "DAdaptSGD": ["d0=3e-2", "growth_rate=1.02"],
    "DAdaptLion": FINDING[:1],
    PRODIGY_PLUS: FINDING[:1],
}
RATES = {"Muon": 1e-2, "CAME": 1e-4}


@pytest.fixture(params=OPTIMIZERS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> OptimizerKind:
    """Each optimizer whose package is installed."""
    pytest.importorskip(request.param.module)
    return request.param


def couples(kind: OptimizerKind) -> bool:
    """Whether an update depends on the gradients of other weights."""
    return kind.one_rate or kind.name == PRODIGY_PLUS


def options(kind: OptimizerKind) -> OptimizerOptions:
    args = ARGS.get(kind.name, FINDING if couples(kind) else [])
    return OptimizerOptions(kind.name, args, learning_rate=1.0 if couples(kind) else RATES.get(kind.name, 1e-3))


class Net(SmallNet):
    """What SDXL has: a convolution, matrices, vectors; one weight is used twice."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.last = nn.Linear(16, 1)
        self.to(dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(super().forward(images))


class Trained:
    """A net, its optimizer and its stepper, as a run connects them."""

    def __init__(
        self,
        kind: OptimizerKind,
        dtype: torch.dtype,
        *,
        fused: bool = False,
        chunk: float = 100,
        offloads: bool = False,
        rounding: str = STOCHASTIC,
    ):
        chosen = options(kind)
        self.net = Net(dtype)
        self.parameters = list(self.net.parameters())
        groups = [
            {"name": "unet", "params": self.parameters[:4], "lr": chosen.learning_rate},
            {"name": "text_encoder_l", "params": self.parameters[4:], "lr": chosen.learning_rate},
        ]
        self.optimizer = make_optimizer(groups, chosen)
        narrow = keys_in_bfloat16(partial(make_optimizer, options=chosen), CPU)
        rounder = Rounder(rounding if dtype == torch.bfloat16 else NEAREST, self.parameters, seed=1)
        chunk = math.inf if couples(kind) else chunk
        self.stepper = Stepper(self.optimizer, rounder, narrow, elements_per_chunk=chunk, offloads=offloads)
        self.fused = FusedBackward(self.stepper, 0.0) if fused else None
        schedule = LambdaLR(self.optimizer, lambda step: 1.0)
        self.resumable = Resumable(
            {"unet": self.net},
            self.optimizer,
            group_settings(self.optimizer),
            schedule,
            narrow_keys=narrow,
            is_offloaded=offloads,
        )

    def train(self, steps: range) -> list[float]:
        """Steps, each on images of its own; returns the losses."""
        losses, accelerator = [], Accelerator(cpu=True)
        for step in steps:
            images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = (self.net(images.to(self.parameters[0].dtype)).float() - 3).square().mean()
            losses.append(float(loss.detach()))
            if self.fused is not None:
                self.fused.backward(accelerator, loss, step)
            else:
                loss.backward()
                self.stepper.step(step)
            self.optimizer.zero_grad(set_to_none=True)
        return losses

    def equals(self, other: "Trained") -> bool:
        """Whether all weights are the same, to the last bit."""
        return all(torch.equal(one, two) for one, two in zip(self.parameters, other.parameters, strict=True))


def test_it_learns_and_a_state_continues_bit_for_bit(kind: OptimizerKind, tmp_path: Path):
    at_once, first, second = (Trained(kind, torch.bfloat16) for _ in range(3))
    losses = at_once.train(range(1, 6))
    assert losses[-1] < losses[0]
    first.train(range(1, 4))
    write_state(tmp_path / "m-state", PROGRESS, first.resumable)
    read_learnt(tmp_path / "m-state", second.resumable)
    assert second.train(range(4, 6)) == losses[3:]
    assert second.equals(at_once)


def test_it_steps_in_the_backward_pass_if_it_treats_each_weight_alone(kind: OptimizerKind):
    is_alone = treats_each_alone(partial(make_optimizer, options=options(kind)), CPU)
    assert is_alone == (not couples(kind))
    if is_alone:
        usual = Trained(kind, torch.bfloat16, chunk=math.inf)
        fused = Trained(kind, torch.bfloat16, fused=True)
        assert usual.train(range(1, 4)) == fused.train(range(1, 4))
        assert usual.equals(fused)


def after_a_step(kind: OptimizerKind, make: Callable[[], torch.Tensor], dtype: torch.dtype, rounding: str):
    """Equal weights after one step with equal gradients."""
    chosen = options(kind)
    weights = Parameter(make().to(dtype))
    optimizer = make_optimizer([{"name": "unet", "params": [weights], "lr": chosen.learning_rate}], chosen)
    narrow = keys_in_bfloat16(partial(make_optimizer, options=chosen), CPU)
    stepper = Stepper(optimizer, Rounder(rounding, [weights], seed=3), narrow)
    weights.grad = torch.full_like(weights, 0.125)
    stepper.step(1)
    return weights.detach().float()


def test_a_step_in_bfloat16_is_on_average_that_in_float32(kind: OptimizerKind):
    ones = partial(torch.ones, 128, 64)
    exact = after_a_step(kind, ones, torch.float32, NEAREST)
    step = 1 - float(exact.double().mean())
    assert 5e-5 < step < 2**-9, "less than half the spacing of bfloat16 below 1"
    assert exact.max() - exact.min() < 0.01 * step
    rounded = after_a_step(kind, ones, torch.bfloat16, STOCHASTIC)
    spacing = 2**-8
    assert set(rounded.unique().tolist()) == {1.0, 1 - spacing}
    # Each weight is a coin; the mean of so many deviates by less than five standard errors but once in two million.
    share = step / spacing
    error = spacing * math.sqrt(share * (1 - share) / rounded.numel())
    assert abs(float(rounded.double().mean()) - (1 - step)) < 5 * error
    assert after_a_step(kind, ones, torch.bfloat16, NEAREST).eq(1).all(), "which rounding to the nearest loses"
