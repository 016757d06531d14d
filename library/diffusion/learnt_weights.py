"""Loss weights that are learnt: a small network knows how large the loss is at each noise level."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Adam

from library.diffusion.options import NUM_TIMESTEPS

SumOverProcesses = Callable[[torch.Tensor], torch.Tensor]
"""From the numbers of one process to their sum over all of them."""

_SEED_OF_FEATURES = 0
_BETAS = (0.9, 0.99)  # as in EDM2


class _Seen(NamedTuple):
    """The losses of a micro-batch before they were weighted, and what each sample counts in the gradient, all [B]."""

    timesteps: torch.Tensor
    losses: torch.Tensor
    shares: torch.Tensor


class LogVariance(nn.Module):
    """u(t): random Fourier features of the timestep, and one linear layer that begins at 0 (EDM2, appendix B)."""

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        generator = torch.Generator().manual_seed(_SEED_OF_FEATURES)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the expected loss at timesteps [B], float32 [B]."""
        angles = timesteps.float()[:, None] / NUM_TIMESTEPS * self.frequencies + self.phases
        u: torch.Tensor = self.linear(angles.cos() * math.sqrt(2 / len(self.phases)))[:, 0]
        return u


class LearntWeights:
    """Weighs each loss L by exp(-u) and learns u, so that L exp(-u) + u is least: u becomes the logarithm of L.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 2.2. Each optimizer
    step of the model is one of u, by the losses that the model learnt from in it: its gradient is computed here, after
    the step, from what went backward. So neither accumulation nor a second backward pass counts a loss twice, a batch
    that only keeps processes together counts nothing, and a step that is skipped teaches nothing.
    """

    def __init__(self, channels: int, learning_rate: float, device: torch.device | str = "cpu"):
        self._network = LogVariance(channels).to(device)
        self._optimizer = Adam(self._network.parameters(), lr=learning_rate, betas=_BETAS)
        self._seen: dict[int, _Seen] = {}
        self._num_weighed = 0

    def log_variance(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return u at timesteps [B], without gradient."""
        with torch.no_grad():
            return self._network(timesteps)

    def weighed(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return L exp(-u) + u for losses L [B]; they are learnt from if a gradient goes back through them."""
        u = self.log_variance(timesteps)
        weighed = losses * (-u).exp() + u
        if weighed.requires_grad:
            note = partial(self._note, self._num_weighed, timesteps, losses.detach())
            weighed.register_hook(note)
            self._num_weighed += 1
        return weighed

    def learn(self, sum_over_processes: SumOverProcesses) -> None:
        """Take a step on u by all losses that went backward since the last one. Every process has to call it."""
        parameters = list(self._network.parameters())
        shares = self._gradient()
        sums = [shares, *(self._gradient_of(parameter).flatten() for parameter in parameters)]
        total, *gradients = sum_over_processes(torch.cat(sums)).split([each.numel() for each in sums])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = (gradient / total).reshape(parameter.shape)
        self._optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Learn nothing from what went backward: the step was skipped."""
        self._seen.clear()
        self._num_weighed = 0
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the network and its optimizer."""
        return {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was saved. The learning rate is that of the present options."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._network.load_state_dict(state_dict["network"])
        self._optimizer.load_state_dict(state_dict["optimizer"])
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _note(self, number: int, timesteps: torch.Tensor, losses: torch.Tensor, shares: torch.Tensor) -> None:
        # By number: where the fused backward pass goes back twice, it is the same losses.
        self._seen[number] = _Seen(timesteps, losses, shares.detach())

    def _gradient(self) -> torch.Tensor:
        """Compute the gradient of the sum over what this process has seen; return the sum of the shares, [1]."""
        self._optimizer.zero_grad(set_to_none=True)
        device = self._network.phases.device
        if not self._seen:
            return torch.zeros(1, device=device)
        timesteps, losses, shares = (torch.cat(each) for each in zip(*self._seen.values(), strict=True))
        u = self._network(timesteps)
        ((losses * (-u).exp() + u) * shares).sum().backward()
        return shares.sum()[None]

    def _gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
