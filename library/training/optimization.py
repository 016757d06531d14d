"""The optimizer over what is trained: parameter groups, schedule, and how weights are stepped."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from library.config.errors import UserError
from library.optim.chunk_exchange import ChunkExchange
from library.optim.fused_backward import FusedBackward
from library.optim.lr_curves import rates_over_run
from library.optim.lr_schedules import make_lr_schedule
from library.optim.muon import EMBEDDING
from library.optim.optimizer_probe import (
    MakeOptimizer,
    can_step_in_parts,
    keys_in_bfloat16,
    require_each_alone,
)
from library.optim.optimizers import make_optimizer, make_parameter_groups, tried
from library.optim.options import NEAREST, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.schedule_options import ScheduleOptions
from library.optim.stepping import Stepper
from library.sdxl.architecture import SdxlModel
from library.sdxl.weight_names import unet_name
from library.training.disk_space import bytes_of_optimizer
from library.training.distribution import SharedError, prepare
from library.training.learner import Learner
from library.training.loss_watch import LossWatch, StepLoss
from library.training.process_options import asks_for_shards
from library.training.resumable import group_settings
from library.training.sharding import Shards


def make_learner(
    model: SdxlModel,
    accelerator: Accelerator,
    optimizer_options: OptimizerOptions,
    schedule_options: ScheduleOptions,
    *,
    trains_l: bool,
    trains_g: bool,
    num_steps: int,
    seed: int,
    freeze_after: Mapping[str, int] | None = None,
    rounding: str = NEAREST,
    max_bad_steps: int = 1,
) -> Learner:
    """Return the optimizer over what is trained, both as accelerate runs them; `seed` and `rounding` are for bfloat16.

    Raise `UserError` if the optimizer has to step in the backward pass but cannot.
    """
    groups = parameter_groups(model, optimizer_options, trains_l=trains_l, trains_g=trains_g)
    networks: dict[str, nn.Module] = {"unet": model.unet}
    networks |= {"text_encoder_l": model.text_encoder_l} if trains_l else {}
    networks |= {"text_encoder_g": model.text_encoder_g} if trains_g else {}
    shards = _make_shards(networks, groups, optimizer_options, accelerator)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, optimizer_options)
    narrow_keys = _narrow_keys(parameters, optimizer_options, accelerator.device)
    rounder = Rounder(rounding, parameters, seed, None if shards is None else shards.first_element)
    if shards is not None and getattr(optimizer, "steps_in_parts", False):
        optimizer.parts = shards  # type: ignore[attr-defined]
    stepper = _make_stepper(optimizer, optimizer_options, accelerator, rounder, narrow_keys, shards)
    settings = group_settings(optimizer)  # before the schedule changes the rates
    if schedule_options.lr_scheduler_type:  # a stranger's may end before the run does
        rates = {group["name"]: group["lr"] for group in groups}
        rates_over_run(optimizer_options, schedule_options, rates, num_steps=num_steps, at=())
    lr_schedule = make_lr_schedule(optimizer, schedule_options, num_steps)
    exchanges = not optimizer_options.fused_backward_pass and shards is None
    trained, optimizer = prepare(accelerator, networks, optimizer, exchanges=exchanges)
    return Learner(
        accelerator=accelerator,
        unet=trained["unet"],
        text_encoder_l=trained.get("text_encoder_l", model.text_encoder_l),
        text_encoder_g=trained.get("text_encoder_g", model.text_encoder_g),
        trained=trained,
        parameters=parameters,
        optimizer=optimizer,
        settings=settings,
        lr_schedule=lr_schedule,
        stepper=stepper,
        fused=_make_fused(stepper, optimizer_options, accelerator, shards),
        max_grad_norm=optimizer_options.max_grad_norm,
        watch=LossWatch(max_bad_steps),
        step_loss=StepLoss(accelerator),
        freeze_after=freeze_after or {},
        narrow_keys=narrow_keys,
        shards=shards,
    )


def _make_shards(
    networks: Mapping[str, nn.Module],
    groups: Sequence[dict[str, Any]],
    options: OptimizerOptions,
    accelerator: Accelerator,
) -> Shards | None:
    """Return the shards of the networks that are trained, if the launcher asks for them; they replace the parameters.

    Raise `UserError` for an optimizer that would have to see whole weights.
    """
    if not asks_for_shards(os.environ):
        return None
    with tried(options.optimizer_type):
        can_share = can_step_in_parts(partial(make_optimizer, options=options), accelerator.device)
    if not can_share:
        raise SharedError(
            f"--optimizer_type={options.optimizer_type} cannot work with FSDP: it needs whole weights, of which each "
            "process has a part.",
            "Choose another, such as Adafactor, AdamW or Lion, or plain multi-GPU.",
        )
    return Shards(list(networks.values()), groups, accelerator)


def parameter_groups(
    model: SdxlModel, options: OptimizerOptions, *, trains_l: bool, trains_g: bool
) -> list[dict[str, Any]]:
    """Return the parameter groups of what is trained; only that requires a gradient afterwards."""
    # L's last block and norm take no part: its features come from the block before.
    last_block = f"layers.{model.text_encoder_l.config.num_hidden_layers - 1}."
    parameters_l = [
        parameter
        for name, parameter in model.text_encoder_l.named_parameters()
        if last_block not in name and "final_layer_norm" not in name
    ]
    for module in (*model.text_encoder_l.modules(), *model.text_encoder_g.modules()):
        if isinstance(module, nn.Embedding):
            setattr(module.weight, EMBEDDING, True)
    return make_parameter_groups(
        options,
        unet=[(unet_name(name), parameter) for name, parameter in model.unet.named_parameters()],
        text_encoder_l=parameters_l if trains_l else (),
        text_encoder_g=model.text_encoder_g.parameters() if trains_g else (),
    )


def _narrow_keys(parameters: Sequence[nn.Parameter], options: OptimizerOptions, device: torch.device) -> frozenset[str]:
    """Return the keys of the optimizer's state that it keeps in bfloat16 where weights are bfloat16."""
    if all(parameter.dtype != torch.bfloat16 for parameter in parameters):
        return frozenset()
    with tried(options.optimizer_type):
        return keys_in_bfloat16(partial(make_optimizer, options=options), device)


def _make_stepper(
    optimizer: Optimizer,
    options: OptimizerOptions,
    accelerator: Accelerator,
    rounder: Rounder,
    narrow_keys: frozenset[str],
    shards: Shards | None,
) -> Stepper:
    """Return the stepper: in chunks, or all at once if the optimizer's parameters depend on one another."""
    make = partial(make_optimizer, options=options)
    with tried(options.optimizer_type):
        each_alone = require_each_alone(make, options, accelerator.device)
    if options.offload_optimizer:
        groups = optimizer.param_groups
        require_host_memory(make, [parameter for group in groups for parameter in group["params"]], rounder.kind)
    if each_alone:
        size_of = nn.Parameter.numel if shards is None else shards.size
        return Stepper(optimizer, rounder, narrow_keys, offloads=options.offload_optimizer, size_of=size_of)
    return Stepper(optimizer, rounder, narrow_keys, elements_per_chunk=math.inf)


def _make_fused(
    stepper: Stepper, options: OptimizerOptions, accelerator: Accelerator, shards: Shards | None
) -> FusedBackward | None:
    """Return what steps in the backward pass, if that is asked for; with other processes it averages the gradients."""
    if not options.fused_backward_pass:
        return None
    if shards is not None:  # whose gradients are the mean already
        return FusedBackward(stepper, options.max_grad_norm, on_each=shards.on_gradient, measure=shards)
    exchange = ChunkExchange() if accelerator.num_processes > 1 else None
    return FusedBackward(stepper, options.max_grad_norm, exchange)


def require_host_memory(make: MakeOptimizer, parameters: Sequence[nn.Parameter], rounding: str) -> None:
    """Raise `UserError` unless the optimizer's state fits into the memory that is free."""
    needed, free = bytes_of_optimizer(make, parameters, rounding), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--offload_optimizer keeps {needed / 2**30:.1f} GiB of state in memory, of which {free / 2**30:.1f} GiB "
            "are free.",
            "Close other programs, or choose an --optimizer_type with less state, such as AdamW8bit or Adafactor.",
        )


def enable_gradient_checkpointing(network: UNet2DConditionModel | PreTrainedModel) -> None:
    """Recompute the network's activations in the backward pass instead of keeping them.

    A U-Net draws no random numbers, so that their generator, which a CUDA graph cannot read, need not be kept for it.
    """
    if isinstance(network, UNet2DConditionModel):
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
        network.enable_gradient_checkpointing(partial(_recomputed, draws=draws))
    elif hasattr(network, "activation_checkpointing_enable"):  # newer releases of transformers
        network.activation_checkpointing_enable()
    else:
        network.gradient_checkpointing_enable()


def _recomputed(module: nn.Module, *inputs: Any, draws: bool) -> Any:
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=draws)
