"""Fine-tune Stable Diffusion XL with a caption of its own for each of its two text encoders.

    accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --in_json meta_lat.json
        --train_data_dir images --output_dir output ...

docs/flags.md explains every flag, docs/architecture.md where to find what.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_flags import TRAINER_REFUSED, TRAINER_REPLACED
from library.config.options import ConfigFileOptions, option, parse_options
from library.data.buckets import BucketOptions, Size, parse_resolution
from library.data.dataset import Batch, CaptionedPictures, LoaderOptions, make_loader
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.training_set import TrainingImage, TrainingSetOptions, encode_missing, read_training_set
from library.diffusion.loss import per_sample_loss
from library.diffusion.noise_schedule import NoiseOptions, draw_training_noise, make_noise_schedule
from library.diffusion.sampler import SamplingNetworks
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.checkpoint_file import write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.sdxl.latents import encode_pixels, vae_digest
from library.sdxl.model_source import ModelOptions, load_model
from library.sdxl.model_spec import ModelSpecOptions, model_spec
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import encode_captions
from library.sdxl.weight_names import unet_name
from library.training.accelerator import default_seed, exchange_gradients, make_accelerator, mean_over_processes
from library.training.checkpoints import Checkpoints, SaveOptions, last_name
from library.training.lr_schedules import ScheduleOptions, make_lr_schedule
from library.training.optimizers import OptimizerOptions, make_optimizer, make_parameter_groups
from library.training.precision import PrecisionOptions
from library.training.sampling import SampleOptions, Sampling
from library.training.tracking import Tracker, TrackingOptions

DESCRIPTION = "Fine-tune Stable Diffusion XL with a caption of its own for each of its two text encoders."


@dataclass(frozen=True)
class RunOptions:
    """How long is trained, and what."""

    _argument_group_name: ClassVar[str] = "Run"

    max_train_steps: int = option(1600, "Optimizer steps.")
    max_train_epochs: int | None = option(None, "Epochs; overrides --max_train_steps.")
    gradient_accumulation_steps: int = option(1, "Batches whose gradients make one optimizer step.")
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass: slower, far smaller.")
    train_text_encoder: bool = option(False, "Train the text encoders too.")
    seed: int | None = option(None, "Seed of everything random; drawn and printed where not given.")
    sdpa: bool = option(True, "Attention is always torch's scaled_dot_product_attention.", choices=(True,))

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        for flag in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                yield f"--{flag} is {value}; it must be 1 or more."


OPTION_CLASSES = [
    ModelOptions,
    TrainingSetOptions,
    BucketOptions,
    LoaderOptions,
    RunOptions,
    PrecisionOptions,
    OptimizerOptions,
    ScheduleOptions,
    NoiseOptions,
    SaveOptions,
    ModelSpecOptions,
    SampleOptions,
    TrackingOptions,
    ConfigFileOptions,
]


@dataclass(frozen=True)
class Options:
    """All options, class by class."""

    model: ModelOptions
    training_set: TrainingSetOptions
    buckets: BucketOptions
    loader: LoaderOptions
    run: RunOptions
    precision: PrecisionOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    noise: NoiseOptions
    save: SaveOptions
    model_spec: ModelSpecOptions
    sample: SampleOptions
    tracking: TrackingOptions
    config_file: ConfigFileOptions

    @property
    def trains_l(self) -> bool:
        """Whether text encoder L is trained."""
        return self.run.train_text_encoder and self.optimizer.learning_rate_te1 != 0

    @property
    def trains_g(self) -> bool:
        """Whether text encoder G is trained."""
        return self.run.train_text_encoder and self.optimizer.learning_rate_te2 != 0

    @property
    def resolution(self) -> Size:
        """The size of training."""
        return parse_resolution(self.training_set.resolution)

    def conflicts(self) -> Iterator[str]:
        """What cannot work between classes."""
        for flag in ("learning_rate_te1", "learning_rate_te2"):
            if getattr(self.optimizer, flag) is not None and not self.run.train_text_encoder:
                yield f"--{flag} has no effect without --train_text_encoder; add it or leave the rate out."
        try:
            self.buckets.rule(self.resolution, enabled=self.training_set.enable_bucket)
        except UserError as error:
            yield str(error)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says."""
    options = Options(
        *parse_options(
            OPTION_CLASSES,
            argv,
            description=DESCRIPTION,
            replaced=TRAINER_REPLACED,
            refused=TRAINER_REFUSED,
            conflicts=lambda *classes: Options(*classes).conflicts(),
        )
    )
    accelerator = make_accelerator(options.precision, options.tracking, datetime.now())
    train(options, accelerator)
    return 0


def train(options: Options, accelerator: Accelerator) -> None:
    """Build what training needs, train, save the finished model."""
    # -- what is trained, and on what
    seed = default_seed() if options.run.seed is None else options.run.seed
    prompts = options.sample.read_prompts()
    model = prepare_model(options, accelerator)
    images = prepare_images(options, model, accelerator)

    shape = BatchShape(
        options.loader.train_batch_size,
        options.run.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    dataset = CaptionedPictures(images, options.loader.num_chunks)
    order = EpochOrder(
        dataset.kinds,
        shape,
        seed=seed,
        num_repeats=options.training_set.dataset_repeats,
        flip=options.training_set.flip_aug,
    )
    loader = make_loader(dataset, order, options.loader)
    num_steps = options.run.max_train_steps
    if options.run.max_train_epochs is not None:
        num_steps = options.run.max_train_epochs * order.steps_per_epoch
    num_epochs = math.ceil(num_steps / order.steps_per_epoch)

    # -- how it is trained
    groups = trained_parameters(options, model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, options.optimizer)
    lr_schedule = make_lr_schedule(optimizer, options.schedule, num_steps)
    unet, optimizer = accelerator.prepare(model.unet, optimizer)
    text_encoder_l = accelerator.prepare(model.text_encoder_l) if options.trains_l else model.text_encoder_l
    text_encoder_g = accelerator.prepare(model.text_encoder_g) if options.trains_g else model.text_encoder_g
    trained = [unet, *[text_encoder_l] * options.trains_l, *[text_encoder_g] * options.trains_g]
    noise_schedule = make_noise_schedule()
    noise_generator = torch.Generator().manual_seed(seed + accelerator.process_index)

    # -- what comes out
    tracker = Tracker(accelerator, options.tracking, num_steps=num_steps, steps_per_epoch=order.steps_per_epoch)
    checkpoints = make_checkpoints(options, model)
    sampling = make_sampling(options, prompts, model, tracker, seed=seed)
    tracker.say(
        f"{len(images)} pictures in {len(set(dataset.kinds))} buckets, {order.num_batches} batches of up to "
        f"{shape.batch_size}, {order.steps_per_epoch} steps an epoch, {num_steps} steps in {num_epochs} epochs, seed {seed}"
    )

    if accelerator.is_main_process:
        sampling.at_start()
    step = 0
    step_loss = torch.zeros((), device=accelerator.device)
    for epoch in range(1, num_epochs + 1):
        order.start_at(epoch - 1)
        for batch in loader:
            batch = batch.to(accelerator.device)
            with exchange_gradients(accelerator, trained, now=batch.completes_step):
                latents = latents_of(batch, model.vae) * LATENT_SCALE  # [B, 4, h, w]
                text = encode_captions(text_encoder_l, text_encoder_g, batch.tokens)  # [B, T, 2048], [B, 1280]
                sizes = size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)  # [B, 6]
                noise, timesteps, noisy_latents = draw_training_noise(
                    latents, noise_schedule, options.noise, noise_generator
                )
                predicted = unet(
                    noisy_latents,
                    timesteps,
                    encoder_hidden_states=text.hidden,
                    added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
                ).sample
                loss = per_sample_loss(predicted, noise).sum() * batch.loss_scale  # summed over a step: its mean
                accelerator.backward(loss)
            step_loss += loss.detach()
            if not batch.completes_step:
                continue

            grad_norm = None
            if options.optimizer.max_grad_norm != 0:
                grad_norm = float(accelerator.clip_grad_norm_(parameters, options.optimizer.max_grad_norm))
            optimizer.step()
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            lr_schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            tracker.log_step(step, mean_over_processes(accelerator, step_loss), rates, grad_norm)
            step_loss.zero_()
            if accelerator.is_main_process:
                sampling.after_step(step)
                checkpoints.after_step(step)
            if step == num_steps:
                break
        if accelerator.is_main_process:
            sampling.after_epoch(step, epoch)
            checkpoints.after_epoch(epoch, is_last=epoch == num_epochs)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        tracker.say(f"saved '{checkpoints.at_end()}'")
    tracker.close()


def prepare_model(options: Options, accelerator: Accelerator) -> SdxlModel:
    """The model on the device, in the precision of training, ready to be trained where it will be."""
    dtypes = options.precision.model_dtypes(
        trains_l=options.trains_l, trains_g=options.trains_g, float32_vae=options.model.no_half_vae
    )
    model = load_model(options.model, dtypes)
    for network in (model.unet, model.vae, model.text_encoder_l, model.text_encoder_g):
        network.requires_grad_(False)
        network.to(accelerator.device)
    trained: list[nn.Module] = [model.unet]
    trained += [model.text_encoder_l] * options.trains_l + [model.text_encoder_g] * options.trains_g
    for network in trained:
        network.train()
        if options.run.gradient_checkpointing:
            enable_gradient_checkpointing(network)
    return model


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Compute the network's activations again in the backward pass; diffusers and transformers differ in the name."""
    enable = getattr(network, "enable_gradient_checkpointing", None) or network.gradient_checkpointing_enable
    enable()


def prepare_images(options: Options, model: SdxlModel, accelerator: Accelerator) -> list[TrainingImage]:
    """The training set; what lacks latents is encoded now, if it is to be cached, by the main process first."""
    rule = options.buckets.rule(options.resolution, enabled=options.training_set.enable_bucket)
    with accelerator.main_process_first():
        images = read_training_set(options.training_set, rule, vae_digest(model.vae))
        if options.training_set.cache_latents or options.training_set.cache_latents_to_disk:
            images = encode_missing(images, model.vae, options.training_set)
    return images


def trained_parameters(options: Options, model: SdxlModel) -> list[dict]:
    """The optimizer's parameter groups. L's last block and norm take no part: features come from the block before."""
    l_parameters = [
        parameter
        for name, parameter in model.text_encoder_l.named_parameters()
        if f"layers.{model.text_encoder_l.config.num_hidden_layers - 1}." not in name and "final_layer_norm" not in name
    ]
    return make_parameter_groups(
        options.optimizer,
        unet=[(unet_name(name), parameter) for name, parameter in model.unet.named_parameters()],
        text_encoder_l=l_parameters if options.trains_l else (),
        text_encoder_g=model.text_encoder_g.parameters() if options.trains_g else (),
    )


def latents_of(batch: Batch, vae: AutoencoderKL) -> torch.Tensor:
    """Unscaled latents [B, 4, h, w] of a batch: from its cache, or encoded now."""
    if batch.latents is not None:
        return batch.latents
    assert batch.pixels is not None
    return encode_pixels(vae, batch.pixels)


def make_checkpoints(options: Options, model: SdxlModel) -> Checkpoints:
    """What saves the model, in the format that the options ask for."""
    source_is_diffusers = not Path(str(options.model.pretrained_model_name_or_path)).is_file()
    file_format = options.save.format(source_is_diffusers=source_is_diffusers)
    if file_format == "diffusers":
        return Checkpoints(
            options.save, "", partial(write_diffusers_folder, model=model, dtype=options.precision.save_dtype)
        )
    return Checkpoints(options.save, f".{file_format}", partial(save_single_file, options=options, model=model))


def save_single_file(path: Path, options: Options, model: SdxlModel) -> None:
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


def make_sampling(options: Options, prompts: list, model: SdxlModel, tracker: Tracker, *, seed: int) -> Sampling:
    """What draws the sample pictures. (accelerate wraps networks in place; the model's own are the trained ones.)"""
    assert options.save.output_dir is not None
    return Sampling(
        options.sample,
        prompts,
        SamplingNetworks(model.unet, model.vae, model.text_encoder_l, model.text_encoder_g),
        tracker,
        output_dir=options.save.output_dir,
        model_name=options.save.output_name,
        size=options.resolution,
        seed=seed,
    )


if __name__ == "__main__":
    sys.exit(main())
