"""Options to the parts of a run: the one place where they are built and connected."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from library.captions.draws import Encoder
from library.config.processes import share_of_process
from library.data.caption_report import report_captions
from library.data.dataset import Batch
from library.data.subsets import Subset
from library.data.training_set import find_training_images
from library.data.validation_split import Split
from library.diffusion.objective import Objective
from library.optim.ema_options import EMA
from library.optim.schedule_options import ScheduleOptions
from library.samples.picture_files import SAMPLE_FOLDER
from library.sdxl.architecture import SdxlModel
from library.sdxl.latents import vae_digest
from library.sdxl.lean_unet import make_lean
from library.sdxl.model_source import architecture_of, load_model, load_unet
from library.training.accelerator import described_processes, make_accelerator_of
from library.training.averages import make_averages
from library.training.backends import choose_backends
from library.training.card_memory import require_card_memory
from library.training.checkpoints import Checkpoints
from library.training.compilation import compile_regions
from library.training.distribution import any_process, wait_for_main
from library.training.failures import explained_out_of_memory, saved_before_errors
from library.training.goal import check_prediction, make_loss_weights, make_objective
from library.training.header import header_maker
from library.training.hub_state import take_state_from_hub
from library.training.learner import Learner, StepReport
from library.training.offload import place_networks
from library.training.optimization import enable_gradient_checkpointing, make_learner
from library.training.outputs import (
    check_disk,
    connect_snapshots,
    make_record,
    make_sampling,
    make_tracker,
    make_uploads,
    make_validation,
)
from library.training.plan import Occasion, Plan
from library.training.preparation import PreparedSet, latents_of, make_plan, prepare_set, split_set, take_captions_over
from library.training.progress import Progress
from library.training.resumable import Kept
from library.training.run_options import TrainingOptions
from library.training.run_record import FINISHED, STOPPED, RecordFile
from library.training.saving import make_checkpoints
from library.training.starting_point import load_state, starting_point, without_damaged_states
from library.training.step_graphs import make_step_graphs
from library.training.stopping import StopRequest
from library.training.summary import summary
from library.training.tracking import Tracker
from library.training.uploads import Uploads
from library.training.validation_set import prepare_validation

log = logging.getLogger(__name__)


class Event(Protocol):
    """What happens beside the training itself: logs, saves, samples. Every process calls every event."""

    def after_step(self, occasion: Occasion, report: StepReport | None) -> None:
        """Do what is due on the occasion; `report` is that of the step, None where the run begins or resumes."""


@dataclass
class Run:
    """The parts of a run, as the loop of sdxl_train.py uses them."""

    plan: Plan
    progress: Progress
    learner: Learner
    objective: Objective
    latents_of: Callable[[Batch], torch.Tensor]
    events: Sequence[Event]
    stop: Callable[[], bool]
    exit_status_of_stop: Callable[[], int]
    checkpoints: Checkpoints
    tracker: Tracker
    accelerator: Accelerator
    uploads: Uploads
    record: RecordFile
    is_resumed: bool

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Begin the run; within the block, save what was learnt before an error ends it."""
        recorded, uploads = self.record.kept(), self.uploads.finished_after_errors()
        with recorded, self.tracker.shown(), uploads, saved_before_errors(self._save_after_error):
            occasion = self.plan.occasion(self.progress, is_resumed=self.is_resumed)
            for event in self.events:
                event.after_step(occasion, None)
            yield

    def end(self) -> int:
        """Save a run that was stopped, close the logs and return the exit status."""
        is_finished = self.progress.step >= self.plan.num_steps
        last_words = "" if is_finished else self.checkpoints.at_stop()
        wait_for_main(self.accelerator)  # else the launcher could end the one that saves
        self.tracker.close()
        self.uploads.finish()
        self.record.end(FINISHED if is_finished else STOPPED)
        log.info(
            summary(
                self.tracker.figures,
                step=self.progress.step,
                num_images=self.tracker.num_images,
                written=list(self.checkpoints.written),
                samples=self.checkpoints.folder / SAMPLE_FOLDER,
                is_finished=is_finished,
            )
        )
        if is_finished:
            return 0
        log.info(last_words)
        return self.exit_status_of_stop()

    def _save_after_error(self) -> str | None:
        # One process alone, and only complete steps: the others may have failed, or not, at another place.
        step = self.progress.step
        if not (self.accelerator.is_main_process and step > 0):
            return None
        # Of sharded weights the others have their parts, and may be gone with them.
        can_save = self.learner.is_between_steps and self.learner.shards is None
        return self.checkpoints.after_error(can_save=can_save)


def set_up(options: TrainingOptions, stop: StopRequest) -> Run:
    """Load model and training set and return the parts of the run. Raise `UserError` for whatever is missing."""
    subsets = options.subsets()
    if options.training_set.update_captions:
        take_captions_over(options, subsets)
    searched = find_training_images(  # before a model is loaded in vain
        subsets, uses_last=not options.training_set.check_latents, is_kept=share_of_process().is_first
    )
    found = split_set(options, searched)
    check_prediction(options)
    cached_encoders = report_captions(
        options.training_set, subsets, found.training, trains_unet=options.trains_unet, trained=options.trained_encoders
    )
    options = take_state_from_hub(options)
    build = partial(_set_up, options, stop, subsets, found, cached_encoders)
    return without_damaged_states(build, options.resume.resume)


def _set_up(
    options: TrainingOptions,
    stop: StopRequest,
    subsets: Sequence[Subset],
    found: Split,
    cached_encoders: Sequence[Encoder],
    damaged: Sequence[Path],
) -> Run:
    accelerator = make_accelerator_of(options)
    choose_backends(options.precision, accelerator.device, deterministic=options.compilation.deterministic)
    log.info("training in %s", described_processes(accelerator))
    require_card_memory(options, partial(architecture_of, options.model), found.training, subsets, accelerator.device)
    state, progress = starting_point(options, subsets, accelerator, damaged)
    uploads = make_uploads(options.hub, accelerator, stop)
    model, digest = _load_model(options)
    prepared = prepare_set(options, found.training, model, digest, accelerator, progress, cached_encoders)
    held_out = prepare_validation(options, found.held_out, model, digest, accelerator, progress)
    _place_model(options, model, prepared, accelerator.device)
    plan = make_plan(prepared, options.loader, options.run, accelerator, progress.seed)
    options = replace(options, save=options.save.for_epochs(plan.num_epochs))
    learner = _make_learner(options, model, accelerator, plan, progress.seed)
    averages = make_averages(options, learner, progress)
    loss_weights = make_loss_weights(options, accelerator)
    # What changes beside weights and optimizer, by the name of its file in a state.
    others: dict[str, Kept] = {**({EMA: averages} if averages else {}), **loss_weights.kept()}
    learnt = learner.resumable(others)
    if state is not None:
        load_state(state, learnt, accelerator)
    averages.begin(progress.step)
    weight_sets = learner.weight_sets(averages.weight_sets())
    if accelerator.is_main_process and not options.only_measures:
        check_disk(options, model, learner, averages, plan, progress)
    tracker = make_tracker(options, plan, progress, accelerator)
    _choose_kernels(options, model, learner, accelerator)
    header = header_maker(options, subsets, prepared.images, plan, progress, model.prediction)
    connect_snapshots(options, model, averages, progress, tracker, accelerator, header)
    checkpoints = make_checkpoints(
        options, model, learner, learnt, averages, progress, tracker, state, stop, header, uploads
    )
    objective, stops = make_objective(options, model.prediction, loss_weights), partial(any_stop, accelerator, stop)
    validation = make_validation(options, held_out, model, learner, objective, progress, tracker, stops, weight_sets)
    sampling = make_sampling(options, model, learner, weight_sets, progress, tracker, stop.is_made, subsets[0].captions)
    return Run(
        plan=plan,
        progress=progress,
        learner=learner,
        objective=objective,
        latents_of=partial(latents_of, vae=model.vae),
        events=(averages, loss_weights, tracker, *validation, checkpoints, sampling),
        stop=stops,
        exit_status_of_stop=lambda: stop.exit_status,
        checkpoints=checkpoints,
        tracker=tracker,
        accelerator=accelerator,
        uploads=uploads,
        record=make_record(
            options, subsets, plan, progress, num_held_out=len(found.held_out), is_writer=accelerator.is_main_process
        ),
        is_resumed=state is not None,
    )


def _place_model(options: TrainingOptions, model: SdxlModel, prepared: PreparedSet, device: torch.device) -> None:
    """Read the U-Net, now that the others need the device no longer, and bring what each step needs beside it."""
    with explained_out_of_memory("while the model is loaded"):
        load_unet(options.model, model.unet, options.model_dtypes.unet, device)
    place_networks(model.networks, prepared.networks_of_steps(model), device)


def _choose_kernels(options: TrainingOptions, model: SdxlModel, learner: Learner, accelerator: Accelerator) -> None:
    """Let steps run as compiled blocks or as graphs, if the options ask for it."""
    compile_regions(model.unet, options.compilation, accelerator.device)
    if options.compilation.cuda_graphs:
        is_exact = options.compilation.deterministic
        learner.graphs = make_step_graphs(
            learner.run_unet, learner.fused, learner.stepper, accelerator, is_exact=is_exact
        )


def _make_learner(
    options: TrainingOptions, model: SdxlModel, accelerator: Accelerator, plan: Plan, seed: int
) -> Learner:
    if accelerator.device.type == "cuda":
        make_lean(model.unet, without_autocast=options.precision.full_bf16)
    return make_learner(
        model,
        accelerator,
        options.optimizer,
        ScheduleOptions() if options.only_measures else options.schedule,
        trains_l=options.trains_l,
        trains_g=options.trains_g,
        num_steps=plan.num_steps,
        seed=seed,
        freeze_after=options.freeze_after(plan.num_steps),
        rounding=options.precision.rounding,
        max_bad_steps=options.run.max_bad_steps,
    )


def any_stop(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Return whether the run is asked to stop, in any process: the same answer in all of them."""
    return any_process(accelerator, stop.is_made())


def _load_model(options: TrainingOptions) -> tuple[SdxlModel, str]:
    """Return the model on the CPU in the precision of training, set up to be trained, and the digest of its VAE.

    The U-Net is without weights: they are read when they are needed, straight to the device.
    """
    source, trains_l, trains_g = options.model, options.trains_l, options.trains_g
    dtypes = options.model_dtypes
    log.info("loading '%s'", source.pretrained_model_name_or_path)
    model = load_model(source, replace(dtypes, vae=None), options.prediction, with_unet=False)
    digest = vae_digest(model.vae)  # before it is narrowed, as prepare_buckets_latents.py takes it
    nn.Module.to(model.vae, dtypes.vae)
    for network in model.networks:
        network.requires_grad_(False)
    trains = {model.unet: True, model.text_encoder_l: trains_l, model.text_encoder_g: trains_g}
    for network in [network for network, is_trained in trains.items() if is_trained]:
        network.train()
        if options.run.gradient_checkpointing:
            enable_gradient_checkpointing(network)
    return model, digest
