"""What ends a run before its time: what the user is told, and what was learnt is saved first."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from library.config.errors import UserError
from library.config.unforeseen import explained
from library.data.dataset import Batch

log = logging.getLogger(__name__)


class NotWorthSaving(UserError):
    """The run ends because its weights are, or are about to be, of no use."""


@contextmanager
def saved_before_errors(save: Callable[[], str | None]) -> Iterator[None]:
    """Save what was learnt before an error (a damaged image, no memory, a lost process) ends the block.

    Raise a `UserError` that says in one line what happened and how to continue. `save` returns what the user is told
    about the saved state, None if there is nothing to save.
    """
    try:
        yield
    except NotWorthSaving:
        raise
    except Exception as error:
        failure = error if isinstance(error, UserError) else explained(error)
        saved = save()
        if saved is not None:
            failure.add_remedy(saved)
        if failure is error:
            raise
        raise failure from error


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
