"""Pictures of one bucket to a batch: latents or pixels, the tokens of both captions, the sizes."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.config.errors import UserError
from library.config.options import option
from library.data.buckets import Size
from library.data.device_copies import to_device
from library.data.epoch_order import EpochOrder, MicroBatch
from library.data.images import load_rgb, resize_and_crop
from library.data.latent_cache import CachedLatents, read_cache
from library.data.latent_preparation import pixels_to_tensor
from library.data.training_set import TrainingImage
from library.sdxl.tokenizers import CHUNK_TOKENS, CaptionTokens, tokenize_captions

_TOKEN_LENGTHS = (None, 150, 225)


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made."""

    _argument_group_name: ClassVar[str] = "Batches"

    train_batch_size: int = option(1, "Pictures that go through the network at once, in each process.")
    max_data_loader_n_workers: int = option(8, "Processes that read batches ahead; 0 reads them in the training one.")
    persistent_data_loader_workers: bool = option(False, "Keep these processes from one epoch to the next.")
    max_token_length: int | None = option(
        None, "Longest caption in tokens: 75, or 150 or 225 in two or three chunks.", choices=_TOKEN_LENGTHS
    )

    @property
    def num_chunks(self) -> int:
        """Chunks of 75 tokens in a caption."""
        return (self.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.train_batch_size < 1:
            yield f"--train_batch_size is {self.train_batch_size}; it must be 1 or more."
        if self.max_data_loader_n_workers < 0:
            yield f"--max_data_loader_n_workers is {self.max_data_loader_n_workers}; it must be 0 or more."
        if self.persistent_data_loader_workers and self.max_data_loader_n_workers == 0:
            yield "--persistent_data_loader_workers needs --max_data_loader_n_workers of 1 or more."


class Batch(NamedTuple):
    """B pictures of one bucket. Sizes are [B, 2], height (top) first, in float32: a legacy crop has fractions.

    Either `latents` [B, 4, h, w] (float32, not yet scaled) or `pixels` [B, 3, H, W] (float32, -1..1) is there.
    `loss_scale` and `completes_step` are as in `MicroBatch`.
    """

    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    tokens: CaptionTokens
    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor
    target_sizes: torch.Tensor
    loss_scale: float
    completes_step: bool
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._replace(
            latents=None if self.latents is None else to_device(self.latents, device),
            pixels=None if self.pixels is None else to_device(self.pixels, device),
            tokens=CaptionTokens(to_device(self.tokens.tokens_l, device), to_device(self.tokens.tokens_g, device)),
            original_sizes=to_device(self.original_sizes, device),
            crop_top_lefts=to_device(self.crop_top_lefts, device),
            target_sizes=to_device(self.target_sizes, device),
        )


class CaptionedPictures(Dataset[Batch]):
    """The training set by micro-batch: `dataset[micro_batch]` is its `Batch`. Works in spawned workers."""

    def __init__(self, images: Sequence[TrainingImage], num_chunks: int):
        self._images = images
        self._num_chunks = num_chunks

    @property
    def kinds(self) -> list[tuple[object, ...]]:
        """What pictures of one batch share: the bucket, and whether their latents are at hand."""
        return [(image.bucket, image.latents is not None) for image in self._images]

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        images = [self._images[index] for index in micro_batch.indices]
        flips = micro_batch.flips
        samples = torch.stack([_sample(image, flip) for image, flip in zip(images, flips, strict=True)])
        are_latents = images[0].latents is not None
        return Batch(
            latents=samples if are_latents else None,
            pixels=None if are_latents else samples,
            tokens=tokenize_captions(
                [image.caption_l for image in images], [image.caption_g for image in images], self._num_chunks
            ),
            original_sizes=torch.tensor([_height_width(image.size) for image in images]),
            crop_top_lefts=torch.tensor([_top_left(image, flip) for image, flip in zip(images, flips, strict=True)]),
            target_sizes=torch.tensor([_height_width(image.bucket) for image in images]),
            loss_scale=micro_batch.loss_scale,
            completes_step=micro_batch.completes_step,
            keys=tuple(image.key for image in images),
        )


def make_loader(dataset: CaptionedPictures, order: EpochOrder, options: LoaderOptions) -> DataLoader[Batch]:
    """Batches in the order of `order`, one epoch an iteration, read ahead by as many workers as there are cores for."""
    num_workers = min(options.max_data_loader_n_workers, max(1, (os.cpu_count() or 1) - 1))
    return _Loader(
        _ErrorsAsItems(dataset),
        batch_size=None,  # the order gives whole batches
        collate_fn=_unchanged,  # torch's own turns the tuple of keys into a list
        sampler=order,  # not integers: without automatic batching any index will do
        num_workers=num_workers,
        persistent_workers=options.persistent_data_loader_workers,
        worker_init_fn=_leave_signals_to_training,
        generator=torch.Generator(),  # else every iteration would draw from the generator of training
    )


def _leave_signals_to_training(worker: int) -> None:
    """A Ctrl-C, and what ends a job on a cluster, reach every process: training stops, and then its workers do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _ErrorsAsItems(Dataset[Any]):
    """The dataset, but a mistake of the user comes out instead of being raised; `_Loader` raises it.

    torch would raise it in the training process with the traceback of the worker as its message.
    """

    def __init__(self, dataset: CaptionedPictures):
        self._dataset = dataset

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | UserError:
        try:
            return self._dataset[micro_batch]
        except UserError as error:
            return error


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class of iterators
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _unchanged(item: Any) -> Any:
    return item


def _sample(image: TrainingImage, flip: bool) -> torch.Tensor:
    """Latents [4, h, w], or pixels [3, H, W] where there are none."""
    if image.latents is None:
        assert image.picture is not None
        bucket, resized, _ = image.picture.assignment
        pixels = pixels_to_tensor(resize_and_crop(load_rgb(image.picture.path), resized, bucket))
        return pixels.flip(-1) if flip else pixels
    cached = read_cache(image.latents) if isinstance(image.latents, Path) else image.latents
    return torch.from_numpy(np.ascontiguousarray(_latents(cached, flip)))


def _latents(cached: CachedLatents, flip: bool) -> np.ndarray:
    if not flip:
        return cached.latents
    assert cached.latents_flipped is not None  # the training set has encoded again what lacked them
    return cached.latents_flipped


def _height_width(size: Size) -> list[float]:
    return [float(size.height), float(size.width)]


def _top_left(image: TrainingImage, flip: bool) -> list[float]:
    return [float(image.crop.top), float(image.crop.left_flipped if flip else image.crop.left)]
