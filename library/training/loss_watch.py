"""The loss and the gradient of each step: NaN, Inf and spikes are noticed, named and not learnt from."""

import logging
import math
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator

from library.config.errors import listed
from library.sdxl.device_copies import HostCopy
from library.sdxl.foreign_weights import is_finite
from library.training.distribution import all_of, mean_over_processes
from library.training.failures import NotWorthSaving
from library.training.gradient_spikes import NormMean
from library.training.sharding import local_part

log = logging.getLogger(__name__)


class StepLoss:
    """The loss of one optimizer step, summed over its micro-batches; knows which of them made it NaN or Inf.

    It is copied to the host as soon as the last forward pass is launched: reading the `mean` waits for that copy, and
    not for the backward pass launched since.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._batches: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._mean: HostCopy | None = None

    def add(self, keys: tuple[str, ...], loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the loss (a scalar) of the micro-batch with the images `keys`; `is_last` if it completes the step."""
        self._batches.append((keys, loss.detach()))
        if is_last:
            whole = torch.stack([loss for _, loss in self._batches]).sum()
            self._mean = HostCopy(mean_over_processes(self._accelerator, whole))

    def mean(self) -> float:
        """Return the loss of the complete step: the mean over all processes."""
        assert self._mean is not None
        return float(self._mean.wait())

    def bad_images(self) -> list[str]:
        """Return the images, of all processes, in micro-batches with NaN or Inf loss. Every process has to ask."""
        return all_of(self._accelerator, [key for keys, loss in self._batches if not loss.isfinite() for key in keys])

    def clear(self) -> None:
        """Begin the next step."""
        self._batches.clear()
        self._mean = None


class LossWatch:
    """Checks the loss of each step before the weights are updated, and the gradient norm afterwards."""

    def __init__(self, max_bad_steps: int):
        self._max_bad_steps = max_bad_steps
        self._bad_in_a_row = 0
        self._mean_norm = NormMean()

    def accepts(self, step: int, loss: float, bad_images: Callable[[], list[str]]) -> bool:
        """Return whether step number `step` may update the weights: its loss is finite. Else name its images.

        `bad_images` is called only then. Raise `NotWorthSaving` after `max_bad_steps` such steps in a row.
        """
        if math.isfinite(loss):
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        problem = f"step {step}: the loss is {loss}, with the images {listed(bad_images())}"
        if self._bad_in_a_row >= self._max_bad_steps:
            raise NotWorthSaving(
                f"{problem}. Training stopped. The current weights were not saved; earlier checkpoints are untouched.",
                "Look at these images and their captions, try a lower --learning_rate or --mixed_precision=no, or "
                f"allow more than {self._max_bad_steps} such steps in a row with --max_bad_steps.",
            )
        log.warning("%s; the weights are not updated", problem)
        return False

    def check_gradient(self, step: int, norm: float | None) -> None:
        """Report a gradient norm (None where it was not computed) that jumps or is not finite."""
        if norm is None:
            return
        if not math.isfinite(norm):
            log.warning("step %d: the gradient norm is %s; the weights are not updated", step, norm)
            return
        times = self._mean_norm.times_usual(norm)
        if times is not None:
            log.warning("step %d: the gradient norm is %.3g, %.0f times the usual", step, norm, times)


def require_finite(networks: Mapping[str, torch.nn.Module]) -> None:
    """Raise `NotWorthSaving` if a weight is NaN or Inf: such a model must not replace a good one."""
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if not is_finite(local_part(parameter.detach())):
                raise NotWorthSaving(
                    f"the weights of {name} have become NaN or Inf ({key}) and are not saved.",
                    "Continue from an older state with a lower --learning_rate.",
                )
