"""What ends a run before its time: what the user is told, and what was learnt is saved first."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from library.config.errors import UserError
from library.data.dataset import Batch

log = logging.getLogger(__name__)


class NotWorthSaving(UserError):
    """The run ends because its weights are, or are about to be, of no use."""


@contextmanager
def saved_before_errors(save: Callable[[], str | None]) -> Iterator[None]:
    """Save what was learnt before a `UserError` (a damaged image, say) ends the block, and add how to continue.

    `save` returns what the user is told about the saved state, None if there is nothing to save.
    """
    try:
        yield
    except NotWorthSaving:
        raise
    except UserError as error:
        saved = save()
        if saved is None:
            raise
        raise UserError(error.problem, f"{error.remedy} {saved}") from error


@contextmanager
def explained_out_of_memory(when: str, batch: Batch | None = None) -> Iterator[None]:
    """Within the block, turn a GPU out of memory into a `UserError` that says when, and which flags help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = ""
        if batch is not None:
            height, width = batch.target_sizes[0].int().tolist()
            size = f", with {len(batch.keys)} images of {width}x{height} in a batch"
        raise UserError(
            f"the GPU is out of memory {when}{size} ({str(error).partition('.')[0]}).",
            "Lower --train_batch_size (and raise --gradient_accumulation_steps), add --gradient_checkpointing, "
            "--full_bf16 with --mixed_precision=bf16, --optimizer_type=Adafactor, or prepare smaller images.",
        ) from error
