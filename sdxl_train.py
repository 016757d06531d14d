"""Fine-tune Stable Diffusion XL with a caption of its own for each of its two text encoders.

    accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --in_json meta_lat.json
        --train_data_dir images --output_dir output ...

docs/flags.md explains every flag, docs/architecture.md where to find what.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

# Read by torch when it is imported: large tensors in huge pages, or the kernel spends longer handing out the memory of
# 3.5 billion weights than the disk spends reading them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from accelerate import Accelerator
from torch import nn

from library.config.atomic_files import remove_leftovers
from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_flags import TRAINER_REFUSED, TRAINER_REPLACED
from library.config.options import parse_options
from library.data.dataset import Batch
from library.data.training_set import require_images
from library.diffusion.noise import NUM_TIMESTEPS, draw_training_noise, make_noise_schedule
from library.diffusion.objective import per_sample_loss
from library.samples.sampler import SamplingNetworks
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.checkpoint_file import write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_model
from library.sdxl.model_spec import model_spec
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.text_encoding import encode_captions
from library.training.accelerator import (
    any_process,
    draw_seed,
    exchange_gradients,
    make_accelerator,
    start_generators,
)
from library.training.checkpoints import Checkpoints, last_name
from library.training.compilation import compile_regions
from library.training.disk_space import bytes_of, bytes_of_state, require_room
from library.training.learner import Learner, enable_gradient_checkpointing, make_learner
from library.training.loss_watch import LossWatch, StepLoss, explained_out_of_memory, require_finite
from library.training.offload import settle, visiting
from library.training.plan import Course, make_course
from library.training.preparation import latents_of, prepare_set
from library.training.resume import check_options, flat_options, library_versions
from library.training.run_lock import sole_run
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from library.training.sampling import SAMPLE_FOLDER, Sampling
from library.training.state import Progress, Setting, find_state, read_learnt, read_progress, write_state
from library.training.stopping import StopRequest, listening_for_stop
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
    with sole_run(options.output_dir, options.save.output_name), listening_for_stop(options.output_dir) as stop:
        return train(options, stop)


def train(options: TrainingOptions, stop: StopRequest) -> int:
    """Build what training needs, train, save the finished model; gives the exit status."""
    require_images(options.training_set)  # before a model is loaded for nothing
    accelerator = make_accelerator(options.precision, options.tracking.trackers, options.tracking.logging_dir)
    state, progress = where_to_begin(options, accelerator)
    model, digest = prepare_model(options)
    prepared = prepare_set(options, model, digest, accelerator, progress)
    of_steps = prepared.networks_of_steps(model)
    settle(model.networks, of_steps=of_steps, device=accelerator.device, folder=options.output_dir)
    course = make_course(*prepared, options.loader, options.training_set, options.run, accelerator, progress.seed)
    learner = make_learner(
        model,
        accelerator,
        options.optimizer,
        options.schedule,
        trains_l=options.trains_l,
        trains_g=options.trains_g,
        num_steps=course.num_steps,
        seed=progress.seed,
        rounding=options.precision.rounding,
    )
    if state is not None:
        read_learnt(state, learner.resumable(accelerator))

    tracker = Tracker(
        accelerator,
        options.tracking,
        options.tracking.run_folder(datetime.fromisoformat(progress.started)),
        num_steps=course.num_steps,
        steps_per_epoch=course.order.steps_per_epoch,
        steps_done=progress.step,
        losses=progress.losses,
    )
    tracker.say(f"{course}, seed {progress.seed}")
    compile_regions(model.unet, options.compilation, accelerator.device, tracker.say)
    checkpoints = make_checkpoints(options, model, learner, progress, tracker, accelerator)
    sampling = make_sampling(options, model, learner, tracker, progress, course, stop)
    watch = LossWatch(options.run.max_bad_steps, tracker.say)
    if accelerator.is_main_process:
        check_disk(options, model, learner, course, progress)
        if state is not None and progress.step < course.num_steps:
            checkpoints.after_resume(state, progress.step, progress.epoch)
        if progress.step == 0:
            sampling.at_start()
        elif progress.step < course.num_steps:  # what was due when the run was stopped, and was left for now
            sampling.when_due(progress.step, course.epoch_ended(progress), only_missing=True)

    noise_schedule = make_noise_schedule()
    noise_generator = torch.Generator()
    step_loss = StepLoss(accelerator)
    is_stopped = any_process(accelerator, stop.is_made())
    first_step = progress.step
    is_finished = False
    while not (is_stopped or is_finished):
        for batch in saved_before_errors(course.batches(progress), checkpoints, progress, accelerator):
            step = progress.step + 1
            if step_loss.is_empty:  # the first batch of the step
                start_generators(noise_generator, progress.seed, step, accelerator.process_index)
            batch = batch.to(accelerator.device)
            with (
                exchange_gradients(accelerator, learner.trained.values(), now=batch.completes_step),
                explained_out_of_memory(f"in step {step}", batch),
            ):
                latents = latents_of(batch, model.vae) * LATENT_SCALE  # [B, 4, h, w]
                text = encode_captions(learner.text_encoder_l, learner.text_encoder_g, batch.tokens, batch.encoded)
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
                step_loss.add(batch.keys, loss, is_last=batch.completes_step)
                learner.backward(accelerator, loss, step)
            if not batch.completes_step:
                continue

            mean_loss, grad_norm = step_loss.mean(), None
            if watch.accepts(step, mean_loss, step_loss.bad_images):
                with explained_out_of_memory(f"in step {step}", batch):
                    grad_norm = learner.step(accelerator, step)
            else:
                learner.skip_step()
            step_loss.clear()
            progress.step, progress.step_in_epoch = step, progress.step_in_epoch + 1
            is_finished = step == course.num_steps

            tracker.log_step(step, mean_loss, learner.rates, grad_norm)
            watch.heed_gradient(step, grad_norm)
            if accelerator.is_main_process:
                # Pictures first: a state that is saved after this step does not draw them again.
                if not is_finished:
                    sampling.when_due(step, course.epoch_ended(progress))
                checkpoints.after_step(step)
            is_stopped = any_process(accelerator, stop.is_made())
            if is_stopped or is_finished:
                break

        is_finished = progress.step >= course.num_steps  # also where nothing was left to do
        if progress.step_in_epoch >= course.order.steps_per_epoch:  # more, where --resume_anyway has shortened epochs
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            if accelerator.is_main_process:
                checkpoints.after_epoch(progress.epoch, is_last=is_finished)
        accelerator.wait_for_everyone()

    last_words = ""
    if accelerator.is_main_process:
        last_words = checkpoints.conclude(progress.step, is_finished)
        if is_finished:  # pictures last: whatever becomes of them, the model is there
            tracker.say(last_words)
            sampling.at_end(progress.step, course.epoch_ended(progress), only_missing=progress.step == first_step)
    accelerator.wait_for_everyone()  # a process that ends sooner could have the launcher end the one that saves
    tracker.close()
    if not is_finished:
        accelerator.print(last_words)
    return stop.exit_status if is_stopped and not is_finished else 0


def where_to_begin(options: TrainingOptions, accelerator: Accelerator) -> tuple[Path | None, Progress]:
    """The state that the run goes on from, if one is asked for, and how far it is; removes what killed runs left."""
    setting = Setting(flat_options(options, num_processes=accelerator.num_processes), versions=library_versions())
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            remove_leftovers(options.output_dir)
            remove_leftovers(options.output_dir / SAMPLE_FOLDER)
        wanted = options.resume.resume
        state = None if wanted is None else find_state(wanted, options.output_dir, options.save.output_name)
    if state is None:
        seed = draw_seed(accelerator) if options.run.seed is None else options.run.seed
        return None, Progress(started=datetime.now().isoformat(timespec="seconds"), seed=seed, setting=setting)
    progress = read_progress(state)
    changes = check_options(progress.setting, setting, anyway=options.resume.resume_anyway)
    accelerator.print(f"going on after step {progress.step} of '{state}'", *changes, sep="\n  ")
    progress.setting = replace(setting, images=progress.setting.images)
    return state, progress


# -- what is trained --------------------------------------------------------------------------------------------------


def prepare_model(options: TrainingOptions) -> tuple[SdxlModel, str]:
    """The model on the CPU, in the precision of training, ready to be trained where it will be; the VAE's digest."""
    dtypes = options.precision.model_dtypes(
        trains_l=options.trains_l, trains_g=options.trains_g, float32_vae=options.model.no_half_vae
    )
    model = load_model(options.model, replace(dtypes, vae=None))
    digest = vae_digest(model.vae)  # before it is narrowed, as prepare_buckets_latents.py takes it
    nn.Module.to(model.vae, dtypes.vae)
    for network in model.networks:
        network.requires_grad_(False)
    trains = {model.unet: True, model.text_encoder_l: options.trains_l, model.text_encoder_g: options.trains_g}
    for network in [network for network, is_trained in trains.items() if is_trained]:
        network.train()
        if options.run.gradient_checkpointing:
            enable_gradient_checkpointing(network)
    return model, digest


# -- what comes out ---------------------------------------------------------------------------------------------------


def make_checkpoints(
    options: TrainingOptions,
    model: SdxlModel,
    learner: Learner,
    progress: Progress,
    tracker: Tracker,
    accelerator: Accelerator,
) -> Checkpoints:
    """What saves models, in the format that the options ask for, and states; the tracker does not count its time."""
    source_is_diffusers = not Path(str(options.model.pretrained_model_name_or_path)).is_file()
    file_format = options.save.format(source_is_diffusers=source_is_diffusers)

    def save_model(path: Path) -> None:
        require_finite(learner.trained)
        with learner.finished_weights():
            if file_format == "diffusers":
                write_diffusers_folder(path, model, options.precision.save_dtype)
            else:
                write_single_file(path, model, options.precision.save_dtype, header(options))

    def save_state(folder: Path) -> None:
        write_state(folder, replace(progress, losses=tracker.losses), learner.resumable(accelerator))

    return Checkpoints(
        options.save,
        suffix="" if file_format == "diffusers" else f".{file_format}",
        write_model=tracker.untimed()(save_model),
        write_state=tracker.untimed()(save_state),
        say=tracker.say,
    )


def header(options: TrainingOptions) -> dict[str, str]:
    """The header of a saved model."""
    trained = options.noise.timestep_range
    return model_spec(
        options.model_spec,
        name=last_name(options.save.output_name),
        resolution=options.resolution,
        timesteps=None if len(trained) == NUM_TIMESTEPS else (trained.start, trained.stop),
        now=datetime.now().astimezone(),
    )


def check_disk(
    options: TrainingOptions, model: SdxlModel, learner: Learner, course: Course, progress: Progress
) -> None:
    """Raise `UserError` unless the disk holds what the rest of this run is going to save."""
    require_room(
        options.save,
        model_bytes=bytes_of(model.networks, options.precision.save_dtype),
        state_bytes=bytes_of_state(options.optimizer, learner.trained.values(), options.precision.rounding),
        steps=range(progress.step + 1, course.num_steps + 1),
        steps_per_epoch=course.order.steps_per_epoch,
    )


def saved_before_errors(
    batches: Iterable[Batch], checkpoints: Checkpoints, progress: Progress, accelerator: Accelerator
) -> Iterator[Batch]:
    """The batches; if one cannot be read (a damaged picture), what was learnt so far is saved before that is said."""
    try:
        yield from batches
    except UserError as error:
        if progress.step == 0 or not accelerator.is_main_process:
            raise
        state = checkpoints.at_stop(progress.step)
        remedy = f'{error.remedy} All that was learnt in {progress.step} steps is saved; go on by --resume "{state}"'
        raise UserError(error.problem, remedy) from error


def make_sampling(
    options: TrainingOptions,
    model: SdxlModel,
    learner: Learner,
    tracker: Tracker,
    progress: Progress,
    course: Course,
    stop: StopRequest,
) -> Sampling:
    """What draws the sample pictures. (accelerate wraps networks in place; the model's own are the trained ones.)"""
    return Sampling(
        options.sample,
        options.sample.read_prompts(),
        SamplingNetworks(
            model.unet,
            model.vae,
            model.text_encoder_l,
            model.text_encoder_g,
            at_hand=partial(visiting, model.unet.device),
        ),
        tracker,
        output_dir=options.output_dir,
        model_name=options.save.output_name,
        size=options.resolution,
        seed=progress.seed,
        is_stopping=stop.is_made,
        since=datetime.fromisoformat(progress.started),
        finished_weights=learner.finished_weights,
    )


if __name__ == "__main__":
    sys.exit(main())
