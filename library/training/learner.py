"""What learns: the trained networks as accelerate runs them, and what moves their weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from library.config.errors import UserError
from library.optim.fused_backward import FusedBackward
from library.optim.lr_schedules import ScheduleOptions, make_lr_schedule
from library.optim.optimizers import OptimizerOptions, make_optimizer, make_parameter_groups
from library.optim.rounding import NEAREST, Rounder
from library.optim.stepping import Stepper, keys_in_bfloat16, treats_each_alone
from library.sdxl.architecture import SdxlModel
from library.sdxl.weight_names import unet_name
from library.training.state import Resumable, group_settings


@dataclass
class Learner:
    """The networks as the loop calls them, those `trained` among them, and the optimizer over `parameters`.

    `settings` are the optimizer's as the options give them, group by group. `rates` has the learning rate of each part
    in the last step. `fused` is there where weights are moved within the backward pass.
    """

    unet: UNet2DConditionModel
    text_encoder_l: nn.Module
    text_encoder_g: nn.Module
    trained: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    settings: list[dict[str, Any]]
    lr_schedule: LambdaLR
    stepper: Stepper
    fused: FusedBackward | None
    max_grad_norm: float
    rates: dict[str, float] = field(default_factory=dict)
    _fused_norm: float | None = None

    def backward(self, accelerator: Accelerator, loss: Tensor, step: int) -> None:
        """The gradient of a loss; fused, it moves the weights too, unless the loss or the gradient is no number."""
        if self.fused is None:
            accelerator.backward(loss)
        else:
            self.rates = self._rates_now()
            self._fused_norm = self.fused.backward(accelerator, loss, step)

    def step(self, accelerator: Accelerator, step: int) -> float | None:
        """Optimizer step number `step`: clip (unless `max_grad_norm` is 0) and move the weights, unless that is done.

        Gives the norm of the gradient where it was taken. A gradient that is NaN or Inf leaves the weights as they are.
        (fp16's scaler takes the norm after it has undone its scaling, and passes such steps over by itself.)
        """
        grad_norm = self._fused_norm
        if self.fused is None:
            if self.max_grad_norm != 0:
                grad_norm = float(accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
            self.rates = self._rates_now()
            if accelerator.scaler is not None:
                self.optimizer.step()
            elif grad_norm is None or math.isfinite(grad_norm):
                self.stepper.step(step)
        self._next()
        return grad_norm

    def skip_step(self) -> None:
        """Let the step pass without moving the weights."""
        self._next()

    def resumable(self, accelerator: Accelerator) -> Resumable:
        """What a state holds of all this."""
        networks = {name: accelerator.unwrap_model(network) for name, network in self.trained.items()}
        return Resumable(networks, self.optimizer, self.settings, self.lr_schedule, accelerator.scaler)

    @contextmanager
    def finished_weights(self) -> Iterator[None]:
        """Within the block the weights are those to look at and to save; after it those to go on with, bit for bit.

        They differ for schedule-free optimizers alone, which train at one point and average at another.
        """
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not hasattr(optimizer, "eval"):
            yield
            return
        to_go_on = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            for parameter, weights in zip(self.parameters, to_go_on, strict=True):
                parameter.data.copy_(weights)

    def _rates_now(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def _next(self) -> None:
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


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
    rounding: str = NEAREST,
) -> Learner:
    """The optimizer over what is trained, and both as accelerate runs them; `seed` and `rounding` are for bfloat16.

    Raises `UserError` where the optimizer cannot be stepped in the backward pass but is to be.
    """
    groups = _parameter_groups(model, optimizer_options, trains_l=trains_l, trains_g=trains_g)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, optimizer_options)
    stepper = _make_stepper(optimizer, optimizer_options, accelerator, Rounder(rounding, parameters, seed))
    settings = group_settings(optimizer)  # before the schedule takes the rates over
    lr_schedule = make_lr_schedule(optimizer, schedule_options, num_steps)
    trained = {"unet": accelerator.prepare(model.unet)}
    if trains_l:
        trained["text_encoder_l"] = accelerator.prepare(model.text_encoder_l)
    if trains_g:
        trained["text_encoder_g"] = accelerator.prepare(model.text_encoder_g)
    fused = optimizer_options.fused_backward_pass
    return Learner(
        unet=trained["unet"],
        text_encoder_l=trained.get("text_encoder_l", model.text_encoder_l),
        text_encoder_g=trained.get("text_encoder_g", model.text_encoder_g),
        trained=trained,
        parameters=parameters,
        optimizer=accelerator.prepare(optimizer),
        settings=settings,
        lr_schedule=lr_schedule,
        stepper=stepper,
        fused=FusedBackward(stepper, optimizer_options.max_grad_norm) if fused else None,
        max_grad_norm=optimizer_options.max_grad_norm,
    )


def _parameter_groups(
    model: SdxlModel, options: OptimizerOptions, *, trains_l: bool, trains_g: bool
) -> list[dict[str, Any]]:
    # L's last block and norm take no part: its features come from the block before.
    last_block = f"layers.{model.text_encoder_l.config.num_hidden_layers - 1}."
    parameters_l = [
        parameter
        for name, parameter in model.text_encoder_l.named_parameters()
        if last_block not in name and "final_layer_norm" not in name
    ]
    return make_parameter_groups(
        options,
        unet=[(unet_name(name), parameter) for name, parameter in model.unet.named_parameters()],
        text_encoder_l=parameters_l if trains_l else (),
        text_encoder_g=model.text_encoder_g.parameters() if trains_g else (),
    )


def _make_stepper(
    optimizer: Optimizer, options: OptimizerOptions, accelerator: Accelerator, rounder: Rounder
) -> Stepper:
    """The optimizer in chunks, or all at once where its parameters depend on one another."""
    make = partial(make_optimizer, options=options)
    each_alone = treats_each_alone(make, accelerator.device)
    if options.fused_backward_pass and not each_alone:
        raise UserError(
            f"--fused_backward_pass cannot work with {type(optimizer).__name__}, which looks at all gradients together "
            "before it moves the first weight.",
            "Choose another --optimizer_type, such as Adafactor, or leave --fused_backward_pass out.",
        )
    if options.fused_backward_pass and accelerator.num_processes > 1:
        raise UserError(
            "--fused_backward_pass cannot work with several processes: each gradient would be used before the others "
            "have added theirs.",
            "Train with one process, or leave --fused_backward_pass out.",
        )
    narrow_keys = keys_in_bfloat16(make, accelerator.device) if rounder.kind != NEAREST else frozenset()
    if each_alone:
        return Stepper(optimizer, rounder, narrow_keys)
    return Stepper(optimizer, rounder, narrow_keys, elements_per_chunk=math.inf)


def enable_gradient_checkpointing(network: UNet2DConditionModel | PreTrainedModel) -> None:
    """Compute the network's activations again in the backward pass."""
    if isinstance(network, UNet2DConditionModel):
        network.enable_gradient_checkpointing()
    elif hasattr(network, "activation_checkpointing_enable"):  # newer releases of transformers
        network.activation_checkpointing_enable()
    else:
        network.gradient_checkpointing_enable()
