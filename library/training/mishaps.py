"""What can go wrong in a step, and what the user is told: losses that are no numbers, spikes, a full GPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from library.config.errors import UserError
from library.data.dataset import Batch

SPIKE = 10.0
"""A gradient is a spike if its norm is so many times the running mean of those before it."""

_MEMORY = 0.98  # how slowly the running mean forgets


class LossWatch:
    """Looks at the loss of each step before the weights are moved, and at the gradient after it."""

    def __init__(self, max_bad_steps: int, say: Callable[[str], None]):
        self._max_bad_steps = max_bad_steps
        self._say = say
        self._bad_in_a_row = 0
        self._mean_norm: float | None = None

    def accepts(self, step: int, loss: float, keys: Sequence[str]) -> bool:
        """Whether step number `step` may move the weights: its loss is a number. Its images are named if not.

        Raises `UserError` after `max_bad_steps` such steps in a row.
        """
        if math.isfinite(loss):
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        problem = f"step {step}: the loss is {loss}, with the images {', '.join(keys)}"
        if self._bad_in_a_row >= self._max_bad_steps:
            raise UserError(
                f"{problem}. The run has stopped; its weights are not saved, what was saved before is as it was.",
                "Look at these images and their captions, try a lower --learning_rate or --mixed_precision=no, or let "
                f"more than {self._max_bad_steps} such steps pass by --max_bad_steps.",
            )
        self._say(f"{problem}; the weights are left as they are")
        return False

    def heed_gradient(self, step: int, norm: float | None) -> None:
        """Say so if the gradient's norm jumps."""
        if norm is None or not math.isfinite(norm):
            return
        if self._mean_norm is not None and norm > SPIKE * self._mean_norm:
            self._say(f"step {step}: the gradient's norm is {norm:.3g}, {norm / self._mean_norm:.0f} times the usual")
        self._mean_norm = norm if self._mean_norm is None else _MEMORY * self._mean_norm + (1 - _MEMORY) * norm


@contextmanager
def explained_out_of_memory(step: int, batch: Batch) -> Iterator[None]:
    """Within the block, a GPU without memory left is a `UserError` that says where, and which flags help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        num_pictures, (height, width) = len(batch.keys), batch.target_sizes[0].tolist()
        raise UserError(
            f"the GPU has no memory left in step {step}, with {num_pictures} pictures of {width}x{height} at once "
            f"({str(error).partition('.')[0]}).",
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
