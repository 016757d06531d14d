"""The training set before the first step: read, encoded as far as it is cached, and ordered into steps."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from library.captions.draws import Encoder
from library.config.errors import UserError
from library.config.leftovers import remove_leftovers
from library.data.caption_sources import update_captions
from library.data.caption_tokens import CaptionTokenizer, cut_captions, tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import Batch, CaptionedImages, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.fingerprints import Fingerprints
from library.data.image_columns import FoundImages
from library.data.latent_preparation import encode_missing
from library.data.latents_of_set import Trust, read_training_set
from library.data.loader_options import LoaderOptions
from library.data.regularization import repeats_in
from library.data.subsets import Subset
from library.data.text_cache import FOLDER_NAME, NO_TEXTS, CachedTexts, encode_texts
from library.data.training_columns import TrainingSet
from library.data.training_set_options import TrainingSetOptions
from library.data.validation_split import Split, split_off
from library.sdxl.architecture import SdxlModel
from library.sdxl.latents import encode_pixels_finite
from library.training.accelerator import make_accelerator_of
from library.training.distribution import SharedError, main_process_first, require_alike
from library.training.failures import explained_out_of_memory
from library.training.offload import on_device
from library.training.plan import Plan
from library.training.progress import Progress
from library.training.resume import check_images
from library.training.run_options import RunOptions, TrainingOptions

log = logging.getLogger(__name__)


class PreparedSet(NamedTuple):
    """What is trained on: the images, with latents where they are cached, and what is cached of their captions."""

    images: TrainingSet
    tokens: CaptionTokenizer
    texts: CachedTexts

    def networks_of_steps(self, model: SdxlModel) -> list[nn.Module]:
        """Return the networks that every step needs; what the others could say is cached."""
        is_needed = {
            model.unet: True,
            model.vae: not self.images.all_have_latents,
            model.text_encoder_l: self.texts.outputs_l is None,
            model.text_encoder_g: self.texts.outputs_g is None,
        }
        return [network for network, needed in is_needed.items() if needed]


def take_captions_over(options: TrainingOptions, subsets: Sequence[Subset]) -> None:
    """Write changed caption files into the metadata, by the main process; the others may read it afterwards."""
    accelerator = make_accelerator_of(options)
    with main_process_first(accelerator):
        for subset in subsets if accelerator.is_main_process else []:
            if subset.metadata_file is not None:
                update_captions(subset.metadata_file, subset.image_dir, (subset.extension_l, subset.extension_g))


def split_set(options: TrainingOptions, found: FoundImages) -> Split:
    """Return which images are trained and which are held out; where nothing is trained these may be all.

    Raise `UserError` where one side is empty, or validation is asked for and nothing is held out.
    """
    split = split_off(found, trains=not options.only_measures)
    flags = options.validation.needs_images
    if flags and not split.held_out:
        raise UserError(
            f"{' and '.join(flags)}: no images are held out.",
            "Set --validation_split, or validation_split in the data set file, such as 0.1.",
        )
    return Split(split.training or found, split.held_out)


def prepare_set(
    options: TrainingOptions,
    found: FoundImages,
    model: SdxlModel,
    digest: str,
    accelerator: Accelerator,
    progress: Progress,
    cached_encoders: Sequence[Encoder],
) -> PreparedSet:
    """Return the training set; what is to be cached and is not yet is encoded now, on disk by the main process first.

    `digest` is the VAE's; the outputs of `cached_encoders` are cached. Raise `UserError` where the state that is
    resumed was made with other images.
    """
    with main_process_first(accelerator):
        if accelerator.is_main_process:
            remove_leftovers(*_folders_written(options.training_set, found))
        images = images_with_latents(options, found, model.vae, digest, accelerator)
        tokens = tokenizer_for(images.used_subsets)
        texts, notes = _texts(options, model, images, tokens, accelerator.device, progress.seed, cached_encoders)
    now = Fingerprints(images)
    require_alike(accelerator, "images", now)
    notes += cut_captions(images, tokens)
    if options.resume.resume is not None:
        anyway = options.resume.resume_anyway or options.training_set.update_captions
        notes += check_images(progress.setting.images, now, anyway=anyway)
    for note in notes:
        log.info(note)
    progress.setting = replace(progress.setting, images=now)
    return PreparedSet(images, tokens, texts)


def _folders_written(options: TrainingSetOptions, found: FoundImages) -> set[Path]:
    """The folders among the images that this run writes into."""
    writes_sizes = any(subset.cache_info for subset in found.used_subsets)
    folders: set[Path] = set()
    if options.cache_latents_to_disk or writes_sizes:
        folders = {image.cache.parent for image in found if options.cache_latents_to_disk or image.subset.cache_info}
    if options.cache_text_encoder_outputs_to_disk:
        folders.update((options.folder / FOLDER_NAME).glob("*/"))  # one of each encoder
    return folders


def images_with_latents(
    options: TrainingOptions, found: FoundImages, vae: AutoencoderKL, digest: str, accelerator: Accelerator
) -> TrainingSet:
    """Return the images as they are found; where the options cache latents, those that lack them are encoded."""
    images = read_images(options.training_set, found, digest, keeps_index=accelerator.is_main_process)
    if not options.training_set.caches_latents or images.all_have_latents:
        return images
    with explained_out_of_memory("while images are encoded"), on_device(accelerator.device, vae):
        return encode_missing(images, vae, options.training_set, digest=digest)


def read_images(
    options: TrainingSetOptions, found: FoundImages, digest: str, *, keeps_index: bool = False
) -> TrainingSet:
    """Return the images as they are found, before anything is encoded; `digest` is the VAE's."""
    trust = Trust(index=not options.check_latents, images=options.skip_cache_check, keeps_index=keeps_index)
    return read_training_set(found, digest, trust=trust, legacy_crop=options.legacy_crop_coords)


def _texts(
    options: TrainingOptions,
    model: SdxlModel,
    images: TrainingSet,
    tokens: CaptionTokenizer,
    device: torch.device,
    seed: int,
    cached_encoders: Sequence[Encoder],
) -> tuple[CachedTexts, list[str]]:
    if not cached_encoders:
        return NO_TEXTS, []
    folder = options.training_set.folder
    cached_l = model.text_encoder_l if "l" in cached_encoders else None
    cached_g = model.text_encoder_g if "g" in cached_encoders else None
    networks = [network for network in (cached_l, cached_g) if network is not None]
    on_disk = options.training_set.cache_text_encoder_outputs_to_disk
    with explained_out_of_memory("while captions are encoded"), on_device(device, *networks):
        return encode_texts(
            images, tokens, cached_l, cached_g, seed=seed, folder=folder / FOLDER_NAME if on_disk else None
        )


def make_plan(
    prepared: PreparedSet,
    loader_options: LoaderOptions,
    run_options: RunOptions,
    accelerator: Accelerator,
    seed: int,
) -> Plan:
    """Return the steps of this process over the images; `--max_train_epochs`, if given, decides their number."""
    images = prepared.images
    order = make_order(
        images,
        run_options,
        seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    if order.num_batches < accelerator.num_processes:
        raise SharedError(
            f"{accelerator.num_processes} processes train, and an epoch has {order.num_batches} batches: some would "
            "never have an image.",
            "Start fewer processes, lower --train_batch_size, or add images or --dataset_repeats.",
        )
    num_steps = num_steps_of(run_options, order)
    dataset = CaptionedImages(images, Captioning(prepared.tokens, seed, num_steps, prepared.texts))
    loader = make_loader(dataset, order, loader_options, accelerator.device)
    return Plan(loader, order, len(images), num_steps, accelerator.device, accelerator.process_index)


def make_order(
    images: TrainingSet, options: RunOptions, seed: int, *, num_processes: int, process_index: int
) -> EpochOrder:
    """Return the order in which one of `num_processes` sees the images."""
    kinds = images.kinds
    names, firsts = np.unique(kinds, return_index=True)
    subset_of = images.columns["subset_of"]
    return EpochOrder(
        kinds,
        BatchShape(
            accumulation_steps=options.gradient_accumulation_steps,
            num_processes=num_processes,
            process_index=process_index,
        ),
        seed=seed,
        num_repeats=_repeats_of(images),
        flip=images.of_subset(lambda subset: subset.augmentation.flip_aug),
        batch_sizes={
            kind: images.subsets[subset_of[first]].batch_size
            for kind, first in zip(names.tolist(), firsts.tolist(), strict=True)
        },
    )


def _repeats_of(images: TrainingSet) -> Sequence[int] | np.ndarray:
    if not any(subset.is_reg for subset in images.used_subsets):
        return images.of_subset(lambda subset: subset.num_repeats)
    return repeats_in([images.subsets[number] for number in images.columns["subset_of"].tolist()])


def num_steps_of(options: RunOptions, order: EpochOrder) -> int:
    """Return the optimizer steps of the run; `--max_train_epochs`, if given, decides."""
    if options.max_train_epochs is not None:
        return options.max_train_epochs * order.steps_per_epoch
    return options.max_train_steps


def latents_of(batch: Batch, vae: AutoencoderKL) -> torch.Tensor:
    """Unscaled latents [B, 4, h, w] of a batch: from its cache, or encoded now; raise `UserError` where not finite."""
    if batch.latents is not None:
        return batch.latents
    assert batch.pixels is not None
    encoded = encode_pixels_finite(vae, batch.pixels)
    if encoded.failed:
        names = ", ".join(batch.keys[index] for index in encoded.failed)
        raise UserError(f"{names}: NaN or Inf in the VAE, in float32 too.", "Look at the image and the VAE's file.")
    return encoded.latents
