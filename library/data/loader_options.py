"""How batches are made: the flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.config.magnitudes import MOST_IMAGES_AT_ONCE, MOST_WORKERS
from library.config.options import option


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made."""

    _argument_group_name: ClassVar[str] = "Batches"

    train_batch_size: int = option(1, "Images per forward pass, in each process.", least=1, most=MOST_IMAGES_AT_ONCE)
    max_data_loader_n_workers: int = option(
        8,
        "Worker processes that prefetch batches. 0 uses a thread of the training process.",
        least=0,
        most=MOST_WORKERS,
    )
    persistent_data_loader_workers: bool = option(False, "Keep the workers alive between epochs.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.persistent_data_loader_workers and self.max_data_loader_n_workers == 0:
            yield "--persistent_data_loader_workers needs --max_data_loader_n_workers of 1 or more."
