"""Fine-tune Stable Diffusion XL with a caption of its own for each of its two text encoders.

    accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --in_json meta_lat.json
        --train_data_dir images --output_dir output ...

docs/flags.md explains every flag, docs/architecture.md where to find what.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

# Read by torch when it is imported: large tensors in huge pages, or the kernel spends longer handing out the memory of
# 3.5 billion weights than the disk spends reading them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_flags import TRAINER_REFUSED, TRAINER_REPLACED
from library.config.options import parse_options
from library.data.dataset import Batch, CaptionedPictures, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.training_set import TrainingImage, encode_missing, read_training_set
from library.diffusion.loss import per_sample_loss
from library.diffusion.noise_schedule import draw_training_noise, make_noise_schedule
from library.diffusion.sampler import SamplingNetworks
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.checkpoint_file import write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.sdxl.latents import encode_pixels_finite, vae_digest
from library.sdxl.model_source import load_model
from library.sdxl.model_spec import model_spec
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import encode_captions
from library.sdxl.weight_names import unet_name
from library.training.accelerator import draw_seed, exchange_gradients, make_accelerator, mean_over_processes
from library.training.checkpoints import Checkpoints, last_name
from library.training.lr_schedules import make_lr_schedule
from library.training.optimizers import make_optimizer, make_parameter_groups
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from library.training.sampling import Sampling
from library.training.tracking import Tracker

DESCRIPTION = "Fine-tune Stable Diffusion XL with a caption of its own for each of its two text encoders."


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says."""
    options = TrainingOptions(
        *parse_options(
            OPTION_CLASSES,
            argv,
            description=DESCRIPTION,
            replaced=TRAINER_REPLACED,
            refused=TRAINER_REFUSED,
            conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
        )
    )
    train(options, make_accelerator(options.precision, options.tracking, datetime.now()))
    return 0


def train(options: TrainingOptions, accelerator: Accelerator) -> None:
    """Build what training needs, train, save the finished model."""
    seed = draw_seed(accelerator) if options.run.seed is None else options.run.seed
    model = prepare_model(options, accelerator)
    course = make_course(options, model, accelerator, seed)
    learner = make_learner(options, model, accelerator, course.num_steps)
    noise_schedule = make_noise_schedule()
    noise_generator = torch.Generator().manual_seed(seed + accelerator.process_index)

    tracker = Tracker(
        accelerator, options.tracking, num_steps=course.num_steps, steps_per_epoch=course.order.steps_per_epoch
    )
    tracker.say(f"{course}, seed {seed}")
    checkpoints = make_checkpoints(options, model, tracker)
    sampling = make_sampling(options, model, tracker, seed)

    if accelerator.is_main_process:
        sampling.at_start()
    step = 0
    step_loss = torch.zeros((), device=accelerator.device)
    for epoch in range(1, course.num_epochs + 1):
        course.order.start_at(epoch - 1)
        for batch in course.loader:
            batch = batch.to(accelerator.device)
            with exchange_gradients(accelerator, learner.trained, now=batch.completes_step):
                latents = latents_of(batch, model.vae) * LATENT_SCALE  # [B, 4, h, w]
                text = encode_captions(learner.text_encoder_l, learner.text_encoder_g, batch.tokens)  # [B, T, 2048] ...
                sizes = size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)  # [B, 6]
                noise, timesteps, noisy_latents = draw_training_noise(
                    latents, noise_schedule, options.noise, noise_generator
                )
                predicted = learner.unet(
                    noisy_latents,
                    timesteps,
                    encoder_hidden_states=text.hidden,
                    added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
                ).sample
                loss = per_sample_loss(predicted, noise).sum() * batch.loss_scale  # added up over a step: its mean
                accelerator.backward(loss)
            step_loss += loss.detach()
            if not batch.completes_step:
                continue

            grad_norm = learner.step(accelerator, options.optimizer.max_grad_norm)
            step += 1

            tracker.log_step(step, mean_over_processes(accelerator, step_loss), learner.rates, grad_norm)
            step_loss.zero_()
            if accelerator.is_main_process:
                sampling.after_step(step)
                checkpoints.after_step(step)
            if step == course.num_steps:
                break
        if accelerator.is_main_process:
            sampling.after_epoch(step, epoch)
            checkpoints.after_epoch(epoch, is_last=epoch == course.num_epochs)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        tracker.say(f"saved '{checkpoints.at_end()}'")
    tracker.close()


# -- what is trained --------------------------------------------------------------------------------------------------


def prepare_model(options: TrainingOptions, accelerator: Accelerator) -> SdxlModel:
    """The model on the device, in the precision of training, ready to be trained where it will be."""
    dtypes = options.precision.model_dtypes(
        trains_l=options.trains_l, trains_g=options.trains_g, float32_vae=options.model.no_half_vae
    )
    model = load_model(options.model, dtypes)
    for network in (model.unet, model.vae, model.text_encoder_l, model.text_encoder_g):
        network.requires_grad_(False)
        network.to(accelerator.device)
    trains = {model.unet: True, model.text_encoder_l: options.trains_l, model.text_encoder_g: options.trains_g}
    for network in [network for network, is_trained in trains.items() if is_trained]:
        network.train()
        if options.run.gradient_checkpointing:
            enable_gradient_checkpointing(network)
    return model


def enable_gradient_checkpointing(network: UNet2DConditionModel | PreTrainedModel) -> None:
    """Compute the network's activations again in the backward pass; diffusers and transformers differ in the name."""
    if isinstance(network, UNet2DConditionModel):
        network.enable_gradient_checkpointing()
    else:
        network.gradient_checkpointing_enable()


@dataclass
class Learner:
    """What learns: the networks as accelerate runs them, and what moves their weights."""

    unet: UNet2DConditionModel
    text_encoder_l: nn.Module
    text_encoder_g: nn.Module
    trained: list[nn.Module]
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    lr_schedule: LRScheduler
    rates: dict[str, float]
    """The learning rate of each part in the last step."""

    def step(self, accelerator: Accelerator, max_grad_norm: float) -> float | None:
        """Clip (unless `max_grad_norm` is 0), move the weights; gives the norm of the gradient where it was taken."""
        grad_norm = None
        if max_grad_norm != 0:
            grad_norm = float(accelerator.clip_grad_norm_(self.parameters, max_grad_norm))
        self.rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm


def make_learner(options: TrainingOptions, model: SdxlModel, accelerator: Accelerator, num_steps: int) -> Learner:
    """The optimizer over what is trained, and both as accelerate runs them."""
    # L's last block and norm take no part: its features come from the block before.
    last_block = f"layers.{model.text_encoder_l.config.num_hidden_layers - 1}."
    parameters_l = [
        parameter
        for name, parameter in model.text_encoder_l.named_parameters()
        if last_block not in name and "final_layer_norm" not in name
    ]
    groups = make_parameter_groups(
        options.optimizer,
        unet=[(unet_name(name), parameter) for name, parameter in model.unet.named_parameters()],
        text_encoder_l=parameters_l if options.trains_l else (),
        text_encoder_g=model.text_encoder_g.parameters() if options.trains_g else (),
    )
    optimizer = make_optimizer(groups, options.optimizer)
    lr_schedule = make_lr_schedule(optimizer, options.schedule, num_steps)
    unet = accelerator.prepare(model.unet)
    text_encoder_l = accelerator.prepare(model.text_encoder_l) if options.trains_l else model.text_encoder_l
    text_encoder_g = accelerator.prepare(model.text_encoder_g) if options.trains_g else model.text_encoder_g
    return Learner(
        unet=unet,
        text_encoder_l=text_encoder_l,
        text_encoder_g=text_encoder_g,
        trained=[unet, *[text_encoder_l] * options.trains_l, *[text_encoder_g] * options.trains_g],
        parameters=[parameter for group in groups for parameter in group["params"]],
        optimizer=accelerator.prepare(optimizer),
        lr_schedule=lr_schedule,
        rates={},
    )


# -- what it is trained on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The batches of a run, and how many steps it takes through them."""

    loader: DataLoader[Batch]
    order: EpochOrder
    num_pictures: int
    num_steps: int
    num_epochs: int

    def __str__(self) -> str:
        return (
            f"{self.num_pictures} pictures in {self.order.num_batches} batches, "
            f"{self.order.steps_per_epoch} steps an epoch, {self.num_steps} steps in {self.num_epochs} epochs"
        )


def make_course(options: TrainingOptions, model: SdxlModel, accelerator: Accelerator, seed: int) -> Course:
    """The batches of this process, in their order."""
    images = prepare_images(options, model, accelerator)
    dataset = CaptionedPictures(images, options.loader.num_chunks)
    order = EpochOrder(
        dataset.kinds,
        BatchShape(
            batch_size=options.loader.train_batch_size,
            accumulation_steps=options.run.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        ),
        seed=seed,
        num_repeats=options.training_set.dataset_repeats,
        flip=options.training_set.flip_aug,
    )
    num_steps = options.run.max_train_steps
    if options.run.max_train_epochs is not None:
        num_steps = options.run.max_train_epochs * order.steps_per_epoch
    return Course(
        loader=make_loader(dataset, order, options.loader),
        order=order,
        num_pictures=len(images),
        num_steps=num_steps,
        num_epochs=math.ceil(num_steps / order.steps_per_epoch),
    )


def prepare_images(options: TrainingOptions, model: SdxlModel, accelerator: Accelerator) -> list[TrainingImage]:
    """The training set; what lacks latents is encoded now, if it is to be cached, by the main process first."""
    with accelerator.main_process_first():
        images = read_training_set(options.training_set, options.bucket_rule, vae_digest(model.vae))
        if options.training_set.cache_latents or options.training_set.cache_latents_to_disk:
            images = encode_missing(images, model.vae, options.training_set)
    return images


def latents_of(batch: Batch, vae: AutoencoderKL) -> torch.Tensor:
    """Unscaled latents [B, 4, h, w] of a batch: from its cache, or encoded now; raises `UserError` where not finite."""
    if batch.latents is not None:
        return batch.latents
    assert batch.pixels is not None
    encoded = encode_pixels_finite(vae, batch.pixels)
    if encoded.failed:
        names = ", ".join(batch.keys[index] for index in encoded.failed)
        raise UserError(f"{names}: NaN or Inf in the VAE, in float32 too.", "Look at the picture and the VAE's file.")
    return encoded.latents


# -- what comes out ---------------------------------------------------------------------------------------------------


def make_checkpoints(options: TrainingOptions, model: SdxlModel, tracker: Tracker) -> Checkpoints:
    """What saves the model, in the format that the options ask for; the tracker does not count its time."""
    source_is_diffusers = not Path(str(options.model.pretrained_model_name_or_path)).is_file()
    file_format = options.save.format(source_is_diffusers=source_is_diffusers)
    if file_format == "diffusers":
        write = partial(write_diffusers_folder, model=model, dtype=options.precision.save_dtype)
        return Checkpoints(options.save, "", tracker.untimed()(write))
    write = partial(save_single_file, options=options, model=model)
    return Checkpoints(options.save, f".{file_format}", tracker.untimed()(write))


def save_single_file(path: Path, options: TrainingOptions, model: SdxlModel) -> None:
    """Write the model with its header."""
    trained = options.noise.timestep_range
    header = model_spec(
        options.model_spec,
        name=last_name(options.save.output_name),
        resolution=options.resolution,
        timesteps=None if len(trained) == 1000 else (trained.start, trained.stop),
        now=datetime.now().astimezone(),
    )
    write_single_file(path, model, options.precision.save_dtype, header)


def make_sampling(options: TrainingOptions, model: SdxlModel, tracker: Tracker, seed: int) -> Sampling:
    """What draws the sample pictures. (accelerate wraps networks in place; the model's own are the trained ones.)"""
    assert options.save.output_dir is not None
    return Sampling(
        options.sample,
        options.sample.read_prompts(),
        SamplingNetworks(model.unet, model.vae, model.text_encoder_l, model.text_encoder_g),
        tracker,
        output_dir=options.save.output_dir,
        model_name=options.save.output_name,
        size=options.resolution,
        seed=seed,
    )


if __name__ == "__main__":
    sys.exit(main())
