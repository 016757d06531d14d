"""What learns: the trained networks, and the steps that update their weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.data.dataset import Batch
from library.diffusion.noise import NoisyLatents
from library.optim.fused_backward import FusedBackward
from library.optim.state_places import unwrapped
from library.optim.stepping import Stepper
from library.sdxl.text_encoding import TextConditioning
from library.training.distribution import exchange_gradients
from library.training.failures import explained_out_of_memory
from library.training.loss_watch import LossWatch, StepLoss
from library.training.resumable import Kept, Resumable
from library.training.sharding import Shards
from library.training.step_graphs import StepGraphs

Blocks = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepReport:
    """What a step came to: its loss, the learning rate of each part, the gradient norm (None if not computed).

    `num_images` counts the images of all its micro-batches and processes. `is_skipped` if it has not updated the
    weights, since loss or gradient were not finite.
    """

    loss: float
    rates: dict[str, float]
    grad_norm: float | None
    num_images: int = 0
    is_skipped: bool = False


@dataclass
class Learner:
    """The networks as the loop calls them, those `trained` among them, and the optimizer over `parameters`.

    `settings` are those of the optimizer's parameter groups as the options set them. `fused` is there if weights are
    updated within the backward pass. `freeze_after` has the last step of networks that are not trained to the end.
    `graphs` is there if steps are replayed.
    """

    accelerator: Accelerator
    unet: nn.Module
    text_encoder_l: nn.Module
    text_encoder_g: nn.Module
    trained: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    settings: list[dict[str, Any]]
    lr_schedule: LRScheduler
    stepper: Stepper
    fused: FusedBackward | None
    max_grad_norm: float
    watch: LossWatch
    step_loss: StepLoss
    narrow_keys: frozenset[str]
    shards: Shards | None = None
    graphs: StepGraphs | None = None
    freeze_after: Mapping[str, int] = field(default_factory=dict)
    is_between_steps: bool = True
    _num_images: int = 0
    _rates: dict[str, float] = field(default_factory=dict)
    _fused_norm: float | None = None
    _frozen: set[str] = field(default_factory=set)

    @contextmanager
    def accumulating(self, batch: Batch, step: int) -> Iterator[None]:
        """The block that runs a micro-batch of step `step`: its gradient is exchanged only if it completes the step."""
        for name, last in self.freeze_after.items():
            if step > last:
                self._freeze(name)
        with (
            exchange_gradients(self.accelerator, self.trained.values(), now=batch.completes_step),
            explained_out_of_memory(f"in step {step}", batch),
        ):
            yield

    def predict(self, noisy: NoisyLatents, text: TextConditioning, sizes: torch.Tensor) -> torch.Tensor:
        """Return the U-Net's prediction [B, 4, h, w] for noisy latents, text and size conditioning [B, 6]."""
        inputs = noisy.latents, noisy.timesteps, text.hidden, text.pooled, sizes
        if self.graphs is not None and torch.is_grad_enabled():
            return self.graphs.predict(*inputs)
        return self.run_unet(*inputs)

    def run_unet(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        hidden: torch.Tensor,
        pooled: torch.Tensor,
        sizes: torch.Tensor,
    ) -> torch.Tensor:
        """Return the U-Net's prediction, launched kernel by kernel."""
        prediction: torch.Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        return prediction

    def backward(self, losses: torch.Tensor, batch: Batch, step: int) -> None:
        """Compute the gradient for the losses [B] of a micro-batch; the fused pass updates the weights as well.

        `loss_scale` makes the sum over a step its mean. A loss or gradient that is not finite updates nothing.
        """
        weighted = losses if batch.loss_weights is None else losses * batch.loss_weights
        loss = weighted.sum() * batch.loss_scale
        self.step_loss.add(batch.keys, loss, is_last=batch.completes_step)
        if batch.loss_scale:  # it makes the sum over a step and all processes its mean
            self._num_images = round(self.accelerator.num_processes / batch.loss_scale)
        if self.fused is None:
            self.accelerator.backward(loss)
            return
        self._rates = self._current_rates()
        self.is_between_steps = False
        if self.graphs is not None:
            self.graphs.backward(loss, step)
        else:
            self._fused_norm = self.fused.backward(self.accelerator, loss, step, self.step_loss.mean)
        self.is_between_steps = True

    def step(self, step: int) -> StepReport:
        """Finish optimizer step `step`: clip, update the weights, advance the schedule, free the gradients.

        The weights stay as they are if the loss is not finite. Raise `NotWorthSaving` for too many such steps.
        """
        loss, grad_norm = self.step_loss.mean(), None
        if self.shards is not None:
            self.shards.take_gradients()
        is_accepted = self.watch.accepts(step, loss, self.step_loss.bad_images)
        if is_accepted:
            self.is_between_steps = False
            with explained_out_of_memory(f"in step {step}"):
                grad_norm = self._update(step)
            self.is_between_steps = True
        elif self.fused is not None:
            self.fused.take_back_step()
        self.step_loss.clear()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.check_gradient(step, grad_norm)
        is_updated = is_accepted and (grad_norm is None or math.isfinite(grad_norm)) and not self._overflowed()
        return StepReport(loss, self._rates, grad_norm, self._num_images, is_skipped=not is_updated)

    def resumable(self, others: Mapping[str, Kept] | None = None) -> Resumable:
        """Return what a state holds of all this, and of `others` that change while training."""
        networks = {name: self.accelerator.unwrap_model(network) for name, network in self.trained.items()}
        moved = self.optimizer, self.settings, self.lr_schedule, self.accelerator.scaler, self.narrow_keys
        return Resumable(networks, *moved, others or {}, is_offloaded=self.stepper.offloads, shards=self.shards)

    def weight_sets(self, averages: Mapping[str, Blocks]) -> dict[str, Blocks]:
        """Return what puts weights in place within a block: "" those that a saved model has, and their averages."""
        sets = {"": self.final_weights, **averages}
        return sets if self.shards is None else {name: self.shards.shown(each) for name, each in sets.items()}

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Within the block the weights are those to sample with and to save; after it those to train on, bit for bit.

        They differ only for schedule-free optimizers, which train at one point and average at another.
        """
        optimizer = unwrapped(self.optimizer)
        if not hasattr(optimizer, "eval"):
            yield
            return
        to_train_on = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        self.stepper.with_states(optimizer.eval)
        try:
            yield
        finally:
            self.stepper.with_states(optimizer.train)
            for parameter, weights in zip(self.parameters, to_train_on, strict=True):
                parameter.data.copy_(weights)

    def _freeze(self, name: str) -> None:
        """Train a network no longer: it is called past the exchange of gradients, and its weights have none."""
        if name in self._frozen:
            return
        self._frozen.add(name)
        network = self.accelerator.unwrap_model(self.trained[name])
        network.requires_grad_(False)
        network.eval()
        setattr(self, name, network)

    def _update(self, step: int) -> float | None:
        """Clip and update the weights unless the backward pass did; return the gradient norm if it was computed.

        A gradient that is NaN or Inf updates nothing. (fp16's scaler computes the norm after it has removed its scale,
        and skips such steps by itself.)
        """
        if self.fused is not None:
            return self._fused_norm
        grad_norm = None
        if self.max_grad_norm != 0 and self.shards is not None:
            grad_norm = self.shards.clip(self.parameters, self.max_grad_norm)
        elif self.max_grad_norm != 0:
            grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
        self._rates = self._current_rates()
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        elif grad_norm is None or math.isfinite(grad_norm):
            self.stepper.step(step)
        return grad_norm

    def _overflowed(self) -> bool:
        """Return whether fp16's scaler has skipped the step."""
        return self.accelerator.scaler is not None and bool(getattr(self.optimizer, "step_was_skipped", False))

    def _current_rates(self) -> dict[str, float]:
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return rates | dict.fromkeys(self._frozen, 0.0)
