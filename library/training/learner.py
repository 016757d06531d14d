"""What learns: the trained networks as accelerate runs them, and what moves their weights."""

import math
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from library.sdxl.architecture import SdxlModel
from library.sdxl.weight_names import unet_name
from library.training.lr_schedules import ScheduleOptions, make_lr_schedule
from library.training.optimizers import OptimizerOptions, make_optimizer, make_parameter_groups
from library.training.state import Resumable, group_settings


@dataclass
class Learner:
    """The networks as the loop calls them, those `trained` among them, and the optimizer over `parameters`.

    `settings` are the optimizer's as the options give them, group by group. `rates` has the learning rate of each part
    in the last step.
    """

    unet: UNet2DConditionModel
    text_encoder_l: nn.Module
    text_encoder_g: nn.Module
    trained: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    settings: list[dict[str, Any]]
    lr_schedule: LambdaLR
    rates: dict[str, float] = field(default_factory=dict)

    def step(self, accelerator: Accelerator, max_grad_norm: float) -> float | None:
        """Clip (unless `max_grad_norm` is 0), move the weights; gives the norm of the gradient where it was taken.

        A gradient that is NaN or Inf leaves the weights as they are. (fp16's scaler takes the norm after it has undone
        its scaling, and passes such steps over by itself.)
        """
        grad_norm = None
        if max_grad_norm != 0:
            grad_norm = float(accelerator.clip_grad_norm_(self.parameters, max_grad_norm))
        self.rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        if grad_norm is None or math.isfinite(grad_norm) or accelerator.scaler is not None:
            self.optimizer.step()
        self._next()
        return grad_norm

    def skip_step(self) -> None:
        """Let the step pass without moving the weights."""
        self._next()

    def resumable(self, accelerator: Accelerator) -> Resumable:
        """What a state holds of all this."""
        networks = {name: accelerator.unwrap_model(network) for name, network in self.trained.items()}
        return Resumable(networks, self.optimizer, self.settings, self.lr_schedule, accelerator.scaler)

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
) -> Learner:
    """The optimizer over what is trained, and both as accelerate runs them."""
    # L's last block and norm take no part: its features come from the block before.
    last_block = f"layers.{model.text_encoder_l.config.num_hidden_layers - 1}."
    parameters_l = [
        parameter
        for name, parameter in model.text_encoder_l.named_parameters()
        if last_block not in name and "final_layer_norm" not in name
    ]
    groups = make_parameter_groups(
        optimizer_options,
        unet=[(unet_name(name), parameter) for name, parameter in model.unet.named_parameters()],
        text_encoder_l=parameters_l if trains_l else (),
        text_encoder_g=model.text_encoder_g.parameters() if trains_g else (),
    )
    optimizer = make_optimizer(groups, optimizer_options)
    settings = group_settings(optimizer)  # before the schedule takes the rates over
    lr_schedule = make_lr_schedule(optimizer, schedule_options, num_steps)
    trained = {"unet": accelerator.prepare(model.unet)}
    if trains_l:
        trained["text_encoder_l"] = accelerator.prepare(model.text_encoder_l)
    if trains_g:
        trained["text_encoder_g"] = accelerator.prepare(model.text_encoder_g)
    return Learner(
        unet=trained["unet"],
        text_encoder_l=trained.get("text_encoder_l", model.text_encoder_l),
        text_encoder_g=trained.get("text_encoder_g", model.text_encoder_g),
        trained=trained,
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=accelerator.prepare(optimizer),
        settings=settings,
        lr_schedule=lr_schedule,
    )


def enable_gradient_checkpointing(network: UNet2DConditionModel | PreTrainedModel) -> None:
    """Compute the network's activations again in the backward pass."""
    if isinstance(network, UNet2DConditionModel):
        network.enable_gradient_checkpointing()
    elif hasattr(network, "activation_checkpointing_enable"):  # newer releases of transformers
        network.activation_checkpointing_enable()
    else:
        network.gradient_checkpointing_enable()
