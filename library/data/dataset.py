"""Images of one bucket to a batch: latents or pixels, the tokens of both captions, the sizes."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from library.captions.draws import CaptionDraw, noise_seed
from library.config.errors import UserError
from library.data.captioning import Captioning
from library.data.columns import in_shared_memory
from library.data.epoch_order import EpochOrder, MicroBatch, StepPlaces
from library.data.latent_preparation import pixels_to_tensor
from library.data.loader_options import LoaderOptions
from library.data.prefetch import prefetch
from library.data.training_columns import TrainingSet
from library.data.training_images import TrainingImage
from library.images.augmented import load_augmented
from library.images.crops import Crop
from library.sdxl.device_copies import to_device
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import EncodedText, TextWeights
from library.sdxl.tokenizers import CaptionTokens

_BATCHES_AHEAD = 3


class Batch(NamedTuple):
    """B images of one bucket. Sizes are [B, 2], height (top) first, in float32: a legacy crop has fractions.

    Either `latents` [B, 4, h, w] (float32, not yet scaled) or `pixels` [B, 3, H, W] (float32, -1..1) is set.
    `tokens`, `weights` and `encoded` are those of `TextBatch`. The loss of each latent cell is multiplied by that of
    `masks` [B, 1, h, w], the loss of each sample by its `loss_weights` [B], if there are any; `loss_scale`,
    `completes_step` and `places` are as in `MicroBatch`.
    `noise_seeds` has a seed for each image, of what is drawn for this visit of it.
    """

    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    tokens: CaptionTokens
    original_sizes: torch.Tensor
    crop_top_lefts: torch.Tensor
    target_sizes: torch.Tensor
    encoded: EncodedText
    weights: TextWeights
    loss_weights: torch.Tensor | None
    loss_scale: float
    completes_step: bool
    keys: tuple[str, ...]
    places: StepPlaces | None = None
    masks: torch.Tensor | None = None
    noise_seeds: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`; copies to a GPU do not block Python."""
        return self._each(partial(to_device, device=device))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return self._each(torch.Tensor.pin_memory)

    def shared(self) -> "Batch":
        """Return the batch in shared memory, where worker processes hand it over. Raise `UserError` if that is full.

        torch's queue would share it in a thread that drops what it cannot share: training would wait for ever.
        """
        return self._each(in_shared_memory)

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
            weights=TextWeights(*map(changed, self.weights)),
            loss_weights=changed(self.loss_weights),
            masks=changed(self.masks),
        )


class CaptionedImages(Dataset[Batch]):
    """The training set by micro-batch: `dataset[micro_batch]` is its `Batch`. Works in spawned workers."""

    def __init__(self, images: Sequence[TrainingImage], captioning: Captioning):
        self.images = TrainingSet.of(images)
        self._captioning = captioning

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        images = [self.images[index] for index in micro_batch.indices]
        draws = [self._captioning.draw(image, micro_batch, place) for place, image in enumerate(images)]
        visits = [_visit(*each) for each in zip(images, draws, micro_batch.flips, strict=True)]
        samples = torch.stack([visit.sample for visit in visits])
        texts = self._captioning.of(images, draws)
        return Batch(
            latents=samples if images[0].has_latents else None,
            pixels=None if images[0].has_latents else samples,
            tokens=texts.tokens,
            original_sizes=torch.tensor([_height_width(image.size) for image in images]),
            crop_top_lefts=torch.tensor([visit.crop_top_left for visit in visits]),
            target_sizes=torch.tensor([_height_width(image.bucket) for image in images]),
            encoded=texts.encoded,
            weights=texts.weights,
            loss_weights=_loss_weights(images),
            loss_scale=micro_batch.loss_scale,
            places=micro_batch.places,
            completes_step=micro_batch.completes_step,
            keys=tuple(image.key for image in images),
            masks=_masks([visit.mask for visit in visits]),
            noise_seeds=tuple(map(noise_seed, draws)),
        )


class BatchLoader:
    """The batches of a `DataLoader`, prefetched: each iteration is one epoch."""

    def __init__(self, loader: DataLoader[Any], device: torch.device):
        self.loader = loader
        self._device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return _prefetched(self.loader, self._device)


def make_loader(
    dataset: CaptionedImages,
    order: EpochOrder,
    options: LoaderOptions,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a value)
) -> BatchLoader:
    """Return the batches in the order of `order`, one epoch per iteration.

    A thread prefetches them, with as many worker processes behind it as the options ask for and there are cores for.
    Batches for a GPU wait in pinned memory.
    """
    num_workers = min(options.max_data_loader_n_workers, max(1, (os.cpu_count() or 1) - 1))
    loader = DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,  # the order yields whole batches
        collate_fn=_unchanged,  # torch's own turns the tuple of keys into a list
        sampler=order,  # not integers: without automatic batching any index will do
        num_workers=num_workers,
        persistent_workers=options.persistent_data_loader_workers,
        worker_init_fn=_leave_signals_to_training,
        generator=torch.Generator(),  # else every iteration would draw from the generator of training
    )
    return BatchLoader(loader, device)


class _ErrorsAsItems(Dataset[Any]):
    """The dataset, which returns a `UserError` instead of raising it; `_prefetched` raises it.

    torch would raise it in the training process with the traceback of the worker as its message.
    """

    def __init__(self, dataset: CaptionedImages):
        self._dataset = dataset

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | UserError:
        try:
            batch = self._dataset[micro_batch]
            return batch if get_worker_info() is None else batch.shared()
        except UserError as error:
            return error


def _prefetched(loader: DataLoader[Any], device: torch.device) -> Iterator[Batch]:
    batches: Iterator[Batch | UserError] = iter(loader)  # starts workers before there is a thread
    _report_lost_workers_with_their_batch()
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers, os.getpid())  # last, and so the first to be called
    begin = None
    if device.type == "cuda":
        batches = map(_pinned, batches)
        begin = partial(torch.cuda.set_device, device)  # a new thread has the first GPU
    for batch in prefetch(batches, _BATCHES_AHEAD, begin=begin):
        if isinstance(batch, UserError):
            # A new one: raising `batch` would make this frame and its traceback hold each other, and the workers.
            raise UserError(batch.problem, batch.remedy)
        yield batch


def _leave_signals_to_training(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach every process of a job: training stops first, then its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _report_lost_workers_with_their_batch() -> None:
    """Leave it to the loader to find out that a worker was killed: it does when it waits for the worker's batch.

    torch's signal handler would raise the error in the middle of whatever the main thread does, a step or a save.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _kill_workers(owner: int) -> None:
    """Kill the workers of process `owner` that are left when it ends after an error.

    Python would end them by SIGTERM, which they ignore, and wait for them forever.
    """
    if os.getpid() != owner:  # a fork of it, whose exit concerns no worker
        return
    if hasattr(signal, "SIGCHLD"):  # absent on Windows; torch's handler would report each of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _pinned(batch: Batch | UserError) -> Batch | UserError:
    return batch if isinstance(batch, UserError) else batch.pin_memory()


def _unchanged(item: Any) -> Any:
    return item


class _Visit(NamedTuple):
    """Latents [4, h, w], or pixels [3, H, W] where none are cached, the crop that they are, and their mask [h, w]."""

    sample: torch.Tensor
    crop_top_left: list[float]
    mask: torch.Tensor | None


def _visit(image: TrainingImage, draw: CaptionDraw, flip: bool) -> _Visit:
    if image.has_latents:
        latents, mask = image.sample(flipped=flip)
        sample = torch.from_numpy(np.ascontiguousarray(latents))
        return _Visit(sample, _top_left(image.crop, flip), _in_direction(mask, flip))
    assert image.source is not None
    augmentation = image.subset.augmentation
    array, crop, mask = load_augmented(image.source, augmentation, draw)
    pixels = pixels_to_tensor(array)
    crop = crop if augmentation.moves_crop else image.crop
    # A centre crop may be conditioned on as a legacy one.
    return _Visit(pixels.flip(-1) if flip else pixels, _top_left(crop, flip), _in_direction(mask, flip))


def _in_direction(mask: np.ndarray | None, flip: bool) -> torch.Tensor | None:
    return None if mask is None else torch.from_numpy(np.ascontiguousarray(mask[:, ::-1] if flip else mask))


def _masks(masks: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return masks [B, 1, h, w], ones for an image without one; None if there are none at all."""
    some = next((mask for mask in masks if mask is not None), None)
    if some is None:
        return None
    return torch.stack([torch.ones_like(some) if mask is None else mask for mask in masks])[:, None]


def _loss_weights(images: Sequence[TrainingImage]) -> torch.Tensor | None:
    weights = [image.loss_weight for image in images]
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights)


def _height_width(size: Size) -> list[float]:
    return [float(size.height), float(size.width)]


def _top_left(crop: Crop, flip: bool) -> list[float]:
    return [float(crop.top), float(crop.left_flipped if flip else crop.left)]
