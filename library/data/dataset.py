"""Pictures of one bucket to a batch: latents or pixels, the tokens of both captions, the sizes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.config.errors import UserError
from library.data.epoch_order import EpochOrder, MicroBatch
from library.data.images import load_rgb, resize_and_crop
from library.data.latent_cache import CachedLatents, read_cache
from library.data.latent_preparation import pixels_to_tensor
from library.data.prefetch import prefetch
from library.data.subsets import LoaderOptions
from library.data.text_cache import NO_TEXTS, CachedTexts
from library.data.training_set import TrainingImage
from library.sdxl.device_copies import to_device
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import EncodedText
from library.sdxl.tokenizers import CaptionTokens, tokenize_captions

_BATCHES_AHEAD = 3


class Batch(NamedTuple):
    """B pictures of one bucket. Sizes are [B, 2], height (top) first, in float32: a legacy crop has fractions.

    Either `latents` [B, 4, h, w] (float32, not yet scaled) or `pixels` [B, 3, H, W] (float32, -1..1) is there.
    `encoded` is what is cached of the captions, whose `tokens` are there in any case. `loss_scale` and `completes_step`
    are as in `MicroBatch`.
    """

    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    tokens: CaptionTokens
    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor
    target_sizes: torch.Tensor
    encoded: EncodedText
    loss_scale: float
    completes_step: bool
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; to a GPU they are copied while Python goes on."""
        return self._each(partial(to_device, device=device))

    def pin_memory(self) -> "Batch":
        """The same batch in memory from which a GPU can copy by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def changed(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        return self._replace(
            latents=changed(self.latents),
            pixels=changed(self.pixels),
            tokens=CaptionTokens(*map(change, self.tokens)),
            original_sizes=change(self.original_sizes),
            crop_top_lefts=change(self.crop_top_lefts),
            target_sizes=change(self.target_sizes),
            encoded=EncodedText(*map(changed, self.encoded)),
        )


class CaptionedImages(Dataset[Batch]):
    """The training set by micro-batch: `dataset[micro_batch]` is its `Batch`. Works in spawned workers."""

    def __init__(self, images: Sequence[TrainingImage], num_chunks: int, texts: CachedTexts = NO_TEXTS):
        self._images = images
        self._num_chunks = num_chunks
        self._texts = texts

    @property
    def kinds(self) -> list[tuple[object, ...]]:
        """What pictures of one batch share: the bucket, and whether their latents are at hand."""
        return [(image.bucket, image.latents is not None) for image in self._images]

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        images = [self._images[index] for index in micro_batch.indices]
        flips = micro_batch.flips
        samples = torch.stack([_sample(image, flip) for image, flip in zip(images, flips, strict=True)])
        are_latents = images[0].latents is not None
        tokens = tokenize_captions(
            [image.caption_l for image in images], [image.caption_g for image in images], self._num_chunks
        )
        return Batch(
            latents=samples if are_latents else None,
            pixels=None if are_latents else samples,
            tokens=tokens,
            original_sizes=torch.tensor([_height_width(image.size) for image in images]),
            crop_top_lefts=torch.tensor([_top_left(image, flip) for image, flip in zip(images, flips, strict=True)]),
            target_sizes=torch.tensor([_height_width(image.bucket) for image in images]),
            encoded=self._texts.of(tokens),
            loss_scale=micro_batch.loss_scale,
            completes_step=micro_batch.completes_step,
            keys=tuple(image.key for image in images),
        )


def make_loader(
    dataset: CaptionedImages,
    order: EpochOrder,
    options: LoaderOptions,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a value)
) -> DataLoader[Batch]:
    """Batches in the order of `order`, one epoch an iteration, read ahead of their use.

    A thread does that, with as many workers behind it as the options ask for and there are cores for. Batches for a
    GPU wait in pinned memory.
    """
    num_workers = min(options.max_data_loader_n_workers, max(1, (os.cpu_count() or 1) - 1))
    return _Loader(
        _ErrorsAsItems(dataset),
        device,
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

    def __init__(self, dataset: CaptionedImages):
        self._dataset = dataset

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | UserError:
        try:
            return self._dataset[micro_batch]
        except UserError as error:
            return error


class _Loader(DataLoader[Any]):
    def __init__(self, dataset: _ErrorsAsItems, device: torch.device, **options: Any):
        super().__init__(dataset, **options)
        self._device = device

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class of iterators
        batches: Iterator[Batch | UserError] = super().__iter__()  # starts workers before there is a thread
        begin = None
        if self._device.type == "cuda":
            batches = map(_pinned, batches)
            begin = partial(torch.cuda.set_device, self._device)  # a new thread has the first GPU
        for batch in prefetch(batches, _BATCHES_AHEAD, begin=begin):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _pinned(batch: Batch | UserError) -> Batch | UserError:
    return batch if isinstance(batch, UserError) else batch.pin_memory()


def _unchanged(item: Any) -> Any:
    return item


def _sample(image: TrainingImage, flip: bool) -> torch.Tensor:
    """Latents [4, h, w], or pixels [3, H, W] where there are none."""
    if image.latents is None:
        assert image.source is not None
        bucket, resized, _ = image.source.assignment
        pixels = pixels_to_tensor(resize_and_crop(load_rgb(image.source.path), resized, bucket))
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
