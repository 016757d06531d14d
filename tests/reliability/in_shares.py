"""What processes that share weights do together in tests; each function is called in all of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from library.optim.ema_options import EmaOptions
from library.optim.fused_backward import FusedBackward
from library.optim.lr_schedules import make_lr_schedule
from library.optim.optimizer_probe import keys_in_bfloat16
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.schedule_options import ScheduleOptions
from library.optim.stepping import Stepper
from library.training.averages import Averages
from library.training.learner import StepReport
from library.training.optimizer_state import optimizer_state
from library.training.plan import Occasion
from library.training.progress import DamagedState, Progress
from library.training.resumable import Resumable, group_settings
from library.training.sharding import Shards, gathered_tensors, without_accelerates_sharding
from library.training.starting_point import load_state
from library.training.state import read_learnt, write_state
from tests.optim.small_net import NetOfBlocks, images_of

STEPS = 3
OPTIMIZERS = {
    each.optimizer_type: each
    for each in (
        OptimizerOptions(optimizer_type="torch.optim.SGD", optimizer_args=["momentum=0.9"]),
        OptimizerOptions(optimizer_type="AdamW", optimizer_args=["eps=1e-5"]),
        OptimizerOptions(optimizer_type="Adafactor", optimizer_args=ADAFACTOR_RECIPE.split()[1:]),
    )
}


class Learning:
    """A net, in parts if there are several processes, and what moves it."""

    def __init__(
        self, options: OptimizerOptions, dtype: torch.dtype = torch.float32, *, is_shared: bool, fused: bool = False
    ):
        self.net, self.options = NetOfBlocks().to(dtype), options
        groups: list[dict[str, Any]] = [{"name": "net", "params": list(self.net.parameters()), "lr": 1e-2}]
        self.shards = Shards([self.net], groups, _accelerator()) if is_shared else None
        self.parameters: list[Parameter] = groups[0]["params"]
        self.optimizer: Any = make_optimizer(groups, options)
        if self.shards and getattr(self.optimizer, "steps_in_parts", False):
            self.optimizer.parts = self.shards
        rounding = STOCHASTIC if dtype == torch.bfloat16 else NEAREST
        rounder = Rounder(rounding, self.parameters, 0, None if self.shards is None else self.shards.first_element)
        narrow = keys_in_bfloat16(partial(make_optimizer, options=options), torch.device("cpu"))
        size_of = Parameter.numel if self.shards is None else self.shards.size
        self.stepper = Stepper(self.optimizer, rounder, narrow, elements_per_chunk=150, size_of=size_of)
        self.fused = (
            FusedBackward(self.stepper, options.max_grad_norm, on_each=self.shards.on_gradient, measure=self.shards)
            if self.shards and fused
            else None
        )
        settings = group_settings(self.optimizer)
        schedule = make_lr_schedule(self.optimizer, ScheduleOptions(), 10)
        cpu, networks = torch.device("cpu"), {"net": self.net}
        average = EmaOptions(ema=True, ema_decay=0.5, ema_precision="bf16")
        self.averages = Averages(average, networks, self.parameters, device=cpu, seed=7, shards=self.shards)
        self.averages.begin(0)
        others = {"ema": self.averages}
        self.learnt = Resumable(networks, self.optimizer, settings, schedule, None, narrow, others, shards=self.shards)

    def step(self, number: int, images: list[torch.Tensor]) -> None:
        """Take a step for the mean of the losses of batches, and those of the other processes."""
        if self.fused is not None:
            [each] = images
            loss = self.net(each).float().square().mean()
            self.fused.backward(_accelerator(), loss, number, mean_loss=lambda: 0.0)
            assert all(weight.grad is None for weight in (*self.parameters, *self.net.parameters()))
            return
        for each in images:
            (self.net(each).float().square().mean() / len(images)).backward()
        if self.shards is not None:
            self.shards.take_gradients()
            if self.options.max_grad_norm:
                self.shards.clip(self.parameters, self.options.max_grad_norm)
        elif self.options.max_grad_norm:
            clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.stepper.step(number)
        self.optimizer.zero_grad()
        self.averages.after_step(Occasion(number, is_last=False), StepReport(0.0, {}, None))

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole weights, in the main process."""
        return {name: tensor.clone() for name, tensor in gathered_tensors(self.net.state_dict()).items()}

    def all(self) -> dict[str, torch.Tensor]:
        """Weights, what the optimizer keeps and the average, whole, in the main process."""
        states = {
            f"{place}/{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for place, state in enumerate(optimizer_state(self.learnt)["state"])
            for key, value in state.items()
        }
        return self.weights() | gathered_tensors(states | self.averages.tensors("ema"))


def _accelerator() -> Accelerator:
    with without_accelerates_sharding():
        return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs()])


def images_of_step(step: int, dtype: torch.dtype, number: int) -> list[torch.Tensor]:
    """The batches of a step, of all processes."""
    return images_of(range(number * step, number * (step + 1)), dtype)


def own(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """The batches that this process has."""
    return images[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else images


def share_as_whole() -> None:
    """Every optimizer moves weights in parts as it moves whole ones; bfloat16 rounds at random to the same bits."""
    accelerator = _accelerator()
    for optimizer_type in OPTIMIZERS:
        for max_grad_norm in (0.0, 0.05):
            for dtype in (torch.float32, torch.bfloat16):
                options = replace(OPTIMIZERS[optimizer_type], max_grad_norm=max_grad_norm)
                shared, whole = (Learning(options, dtype, is_shared=is_shared) for is_shared in (True, False))
                before, learning = whole.weights(), [shared, Learning(options, dtype, is_shared=True, fused=True)]
                for step in range(1, STEPS + 1):
                    images = images_of_step(step, dtype, accelerator.num_processes)
                    for each in learning:
                        each.step(step, own(images))
                    whole.step(step, images)
                # Sums of two have no order; the last digits of three depend on it, which bfloat16 has few of.
                # Adafactor's sums over weights have another order in parts.
                is_equal = accelerator.num_processes == 2 and optimizer_type != "Adafactor"
                limit = 0.0 if is_equal else 2e-5 if dtype == torch.float32 else 0.1
                for each in learning:
                    what = optimizer_type, max_grad_norm, dtype, each.fused is not None
                    require_close(before, whole.weights(), each.weights(), limit, what)
    dist.destroy_process_group()


def not_a_number_in_one() -> None:
    """A loss that is NaN in one process moves no part in any, and nobody waits for the others."""
    accelerator = _accelerator()
    for name, options in OPTIMIZERS.items():
        for max_grad_norm in (0.0, 0.05):
            learning = Learning(replace(options, max_grad_norm=max_grad_norm), is_shared=True, fused=True)
            before = learning.weights()
            [images] = own(images_of_step(1, torch.float32, accelerator.num_processes))
            loss = learning.net(images).square().mean() * (float("nan") if dist.get_rank() else 1.0)
            mean = partial(accelerator.reduce, loss.detach().clone(), reduction="mean")
            assert learning.fused is not None
            assert learning.fused.backward(accelerator, loss, 1, lambda mean=mean: float(mean())) is None
            for key, weight in learning.weights().items():
                assert torch.equal(weight, before[key]), (name, max_grad_norm, key)
    _end(accelerator)


def save(folder: str) -> None:
    """Save what was learnt in some steps, and what is in the state."""
    accelerator = _accelerator()
    for name, options in OPTIMIZERS.items():
        learning = Learning(options, torch.bfloat16, is_shared=accelerator.num_processes > 1)
        for step in range(1, STEPS + 1):
            learning.step(step, own(images_of_step(step, torch.bfloat16, 12)))
        write_state(Path(folder) / f"{name}-state", Progress(step=STEPS), learning.learnt)
        found = learning.all()
        if accelerator.is_main_process:
            torch.save(found, Path(folder) / f"{name}.pt")
    _end(accelerator)


def resume(folder: str) -> None:
    """Read what any number of processes have saved, bit for bit, in parts and whole."""
    accelerator = _accelerator()
    for name, options in OPTIMIZERS.items():
        saved = torch.load(Path(folder) / f"{name}.pt", weights_only=True)
        for is_shared in {accelerator.num_processes > 1, False}:
            learning = Learning(options, torch.bfloat16, is_shared=is_shared)
            read_learnt(Path(folder) / f"{name}-state", learning.learnt)
            found = learning.all()
            assert found.keys() == saved.keys() or not accelerator.is_main_process
            for key, tensor in found.items():
                assert torch.equal(tensor, saved[key]) and tensor.dtype == saved[key].dtype, (name, key)
    _end(accelerator)


def resume_damaged(folder: str) -> None:
    """At least one process names the damage of a state; what it does with the others is up to `load_state`."""
    accelerator = _accelerator()
    learning = Learning(OPTIMIZERS["AdamW"], torch.bfloat16, is_shared=accelerator.num_processes > 1)
    with pytest.raises(DamagedState, match=r"shard-00002\.safetensors|another process"):
        load_state(Path(folder) / "AdamW-state", learning.learnt, accelerator)
    _end(accelerator)


def save_and_resume(folder: str) -> None:
    """Both, one after the other."""
    save(folder)
    resume(folder)


def _end(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        dist.barrier()


def require_close(
    before: dict[str, torch.Tensor],
    whole: dict[str, torch.Tensor],
    shared: dict[str, torch.Tensor],
    limit: float,
    what: object,
) -> None:
    """Fail unless weights that were shared are as far from the others as a limit allows, in parts of what is learnt."""
    if dist.get_rank():
        return
    assert shared.keys() == whole.keys()
    learnt = torch.stack([(whole[name] - before[name]).float().norm() for name in before]).norm()
    apart = torch.stack([(whole[name] - shared[name]).float().norm() for name in before]).norm()
    print(*what, float(apart / learnt))
    assert learnt > 0 and apart <= limit * learnt, what
