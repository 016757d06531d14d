"""What can go wrong in a step, and what the user is told: losses that are no numbers, spikes, a full GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from library.config.errors import UserError
from library.data.dataset import Batch
from library.sdxl.device_copies import HostCopy
from library.training.accelerator import all_of, mean_over_processes

SPIKE = 10.0
"""A gradient is a spike if its norm is so many times the running mean of those before it."""

_MEMORY = 0.98  # how slowly the running mean forgets


class StepLoss:
    """The loss of one optimizer step, added up over its batches; knows which of them made it NaN or Inf.

    It is on its way to the host as soon as the last forward pass is launched: who asks for its `mean` waits for that,
    and not for the backward pass that may have been launched since.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._batches: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._mean: HostCopy | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the step's first batch is still to come."""
        return not self._batches

    def add(self, keys: tuple[str, ...], loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the loss (a scalar) of the batch with the images `keys`; `is_last` where it completes the step."""
        self._batches.append((keys, loss.detach()))
        if is_last:
            whole = torch.stack([loss for _, loss in self._batches]).sum()
            self._mean = HostCopy(mean_over_processes(self._accelerator, whole))

    def mean(self) -> float:
        """The loss of the step, which is complete: the mean over all processes."""
        assert self._mean is not None
        return float(self._mean.wait())

    def bad_images(self) -> list[str]:
        """The images, in all processes, of the batches whose loss is NaN or Inf; every process has to ask."""
        return all_of(self._accelerator, [key for keys, loss in self._batches if not loss.isfinite() for key in keys])

    def clear(self) -> None:
        """Begin the next step."""
        self._batches.clear()
        self._mean = None


class LossWatch:
    """Looks at the loss of each step before the weights are moved, and at the gradient after it."""

    def __init__(self, max_bad_steps: int, say: Callable[[str], None]):
        self._max_bad_steps = max_bad_steps
        self._say = say
        self._bad_in_a_row = 0
        self._mean_norm: float | None = None

    def accepts(self, step: int, loss: float, bad_images: Callable[[], list[str]]) -> bool:
        """Whether step number `step` may move the weights: its loss is a number. Else its images are named.

        `bad_images` gives them and is called only then. Raises `UserError` after `max_bad_steps` such steps in a row.
        """
        if math.isfinite(loss):
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        problem = f"step {step}: the loss is {loss}, with the images {', '.join(bad_images())}"
        if self._bad_in_a_row >= self._max_bad_steps:
            raise UserError(
                f"{problem}. The run has stopped; its weights are not saved, what was saved before is as it was.",
                "Look at these images and their captions, try a lower --learning_rate or --mixed_precision=no, or let "
                f"more than {self._max_bad_steps} such steps pass by --max_bad_steps.",
            )
        self._say(f"{problem}; the weights are left as they are")
        return False

    def heed_gradient(self, step: int, norm: float | None) -> None:
        """Say so if the gradient's norm (None where it was not taken) jumps, or is no number."""
        if norm is None:
            return
        if not math.isfinite(norm):
            self._say(f"step {step}: the gradient's norm is {norm}; the weights are left as they are")
            return
        if self._mean_norm is not None and norm > SPIKE * self._mean_norm:
            self._say(f"step {step}: the gradient's norm is {norm:.3g}, {norm / self._mean_norm:.0f} times the usual")
        self._mean_norm = norm if self._mean_norm is None else _MEMORY * self._mean_norm + (1 - _MEMORY) * norm


@contextmanager
def explained_out_of_memory(when: str, batch: Batch | None = None) -> Iterator[None]:
    """Within the block, a GPU without memory left is a `UserError` that says when, and which flags help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = ""
        if batch is not None:
            height, width = batch.target_sizes[0].int().tolist()
            size = f", with {len(batch.keys)} pictures of {width}x{height} at once"
        raise UserError(
            f"the GPU has no memory left {when}{size} ({str(error).partition('.')[0]}).",
            "Lower --train_batch_size (and raise --gradient_accumulation_steps), add --gradient_checkpointing, "
            "--full_bf16 with --mixed_precision=bf16, --optimizer_type=Adafactor, or prepare smaller pictures.",
        ) from error


def require_finite(networks: dict[str, torch.nn.Module]) -> None:
    """Raise `UserError` if a weight is NaN or Inf: such a model must not take the place of a good one."""
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"the weights of {name} have become NaN or Inf ({key}) and are not saved.",
                    "Go on from an older state with a lower --learning_rate.",
                )
