"""What a run writes: logs, models, states and sample images, and whether the disk holds them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from library.captions.rules import ZEROS, PairRules
from library.data.subsets import Subset
from library.diffusion.objective import Objective
from library.optim.ema_options import profile_name
from library.samples.sampler import SamplingNetworks
from library.sdxl.architecture import SdxlModel
from library.training.averages import Averages
from library.training.disk_space import bytes_of, bytes_of_state, require_disk_for_saves
from library.training.distribution import any_process, from_main, one_writer
from library.training.ema_snapshots import SnapshotRecord, SnapshotSaver, snapshot_folder
from library.training.header import caption_sources
from library.training.hub import Hub
from library.training.hub_options import HubOptions
from library.training.learner import Learner
from library.training.offload import on_device
from library.training.plan import Plan
from library.training.preparation import latents_of
from library.training.progress import Progress
from library.training.run_options import TrainingOptions
from library.training.run_record import RecordFile, RunRecord, changed_values
from library.training.sampling import SampledRun, Sampling
from library.training.sharding import gathered_tensors
from library.training.stopping import StopRequest
from library.training.summary import logged_options
from library.training.tracking import Tracker
from library.training.uploads import Uploads
from library.training.validation import Validation, WeightSets
from library.training.validation_log import ValidationLog
from library.training.validation_set import ValidationSet

log = logging.getLogger(__name__)

_THUMBNAIL = "modelspec.thumbnail"  # of the weights, not of an average


def make_tracker(options: TrainingOptions, plan: Plan, progress: Progress, accelerator: Accelerator) -> Tracker:
    """Return what logs the run, and log its plan."""
    tracker = Tracker(
        accelerator,
        options.tracking,
        options.tracking.run_folder(datetime.fromisoformat(progress.started)),
        num_steps=plan.num_steps,
        steps_per_epoch=plan.order.steps_per_epoch,
        steps_done=progress.step,
        losses=progress.losses,
        num_images=progress.num_images or plan.order.images_in(progress.step),
        config=logged_options(options) if options.tracking.log_config else None,
    )
    log.info("%s, seed %d", plan, progress.seed)
    return tracker


def make_record(
    options: TrainingOptions,
    subsets: Sequence[Subset],
    plan: Plan,
    progress: Progress,
    *,
    num_held_out: int,
    is_writer: bool,
) -> RecordFile:
    """Return what records in the output folder that the run exists, and how it ends."""
    folder = options.tracking.run_folder(datetime.fromisoformat(progress.started))
    order = plan.order
    record = RunRecord(
        started=progress.started,
        output_name=options.save.output_name,
        seed=progress.seed,
        options=changed_values(options),
        set={
            "images": plan.num_images,
            "held_out": num_held_out,
            "batches_per_epoch": order.num_batches,
            "steps_per_epoch": order.steps_per_epoch,
            "epochs": plan.num_epochs,
            "steps": plan.num_steps,
        },
        captions=caption_sources(subsets),
        log_folder=None if folder is None or "tensorboard" not in options.tracking.trackers else str(folder.absolute()),
    )
    return RecordFile(options.output_dir, record, progress, is_writer=is_writer)


def make_uploads(options: HubOptions, accelerator: Accelerator, stop: StopRequest) -> Uploads:
    """Return what uploads saves, in the main process. Raise `UserError` for a repository that cannot be written to."""
    if options.huggingface_repo_id is None or not accelerator.is_main_process:
        return Uploads(options, None)
    hub = Hub(options)
    hub.require_repository()
    return Uploads(options, hub, stop.waiting)


def connect_snapshots(
    options: TrainingOptions,
    model: SdxlModel,
    averages: Averages,
    progress: Progress,
    tracker: Tracker,
    accelerator: Accelerator,
    header: Callable[[], dict[str, str]],
) -> None:
    """Let the averages save snapshots where these are due; saving is not timed as training."""
    source = str(options.model.pretrained_model_name_or_path)
    source = str(Path(source).absolute()) if Path(source).exists() else source
    is_whole = options.model.vae is None and not options.model.transposed_text_projection
    run = f"{progress.started}, seed {progress.seed}"

    def record_of(name: str, sigma_rel: float, step: int) -> SnapshotRecord:
        begun = averages.begun(name)
        return SnapshotRecord(
            run=f"{run}, from step {begun}" if begun else run,
            step=step,
            num_steps=step - begun,
            sigma_rel=sigma_rel,
            model=source if is_whole else "",
            header={key: value for key, value in header().items() if key != _THUMBNAIL},
            prediction=asdict(model.prediction),
        )

    saver = SnapshotSaver(
        snapshot_folder(options.output_dir, options.save.output_name),
        options.save.output_name,
        widths={profile_name(width): width for width in options.ema.snapshot_widths},
        record_of=record_of,
        tensors_of=lambda name: gathered_tensors(averages.tensors(name)),
        one_writer=partial(one_writer, accelerator),
    )
    averages.on_snapshot = tracker.untimed()(saver.save)


def make_sampling(
    options: TrainingOptions,
    model: SdxlModel,
    learner: Learner,
    weight_sets: WeightSets,
    progress: Progress,
    tracker: Tracker,
    is_stopping: Callable[[], bool],
    captions: PairRules,
) -> Sampling:
    """Return what draws the sample images. accelerate wraps networks in place: the model's are the trained ones."""
    networks = SamplingNetworks(
        model.unet,
        model.vae,
        model.text_encoder_l,
        model.text_encoder_g,
        at_hand=partial(on_device, model.unet.device),
        zeros_l=captions.rules_l.dropped_caption == ZEROS,
        zeros_g=captions.rules_g.dropped_caption == ZEROS,
        prediction=model.prediction,
        kept_texts=None if options.trained_encoders else {},
    )
    run = SampledRun(
        options.output_dir,
        options.save.output_name,
        options.resolution,
        progress.seed,
        since=datetime.fromisoformat(progress.started),
    )
    return Sampling(
        options.sample,
        networks,
        tracker,
        run,
        is_stopping=is_stopping if learner.shards is None else lambda: any_process(learner.accelerator, is_stopping()),
        weight_sets=weight_sets,
        one_writer=partial(one_writer, learner.accelerator),
        from_main=None if learner.shards is None else partial(from_main, learner.accelerator),
    )


def make_validation(
    options: TrainingOptions,
    held_out: ValidationSet | None,
    model: SdxlModel,
    learner: Learner,
    objective: Objective,
    progress: Progress,
    tracker: Tracker,
    is_stopping: Callable[[], bool],
    weight_sets: WeightSets,
) -> list[Validation]:
    """Return what measures the loss on the images that are held out; nothing where none are."""
    if held_out is None:
        return []
    folder = options.tracking.run_folder(datetime.fromisoformat(progress.started))
    is_writer = learner.accelerator.is_main_process
    return [
        Validation(
            options.validation,
            held_out,
            learner=learner,
            objective=objective,
            vae=model.vae,
            latents_of=partial(latents_of, vae=model.vae),
            tracker=tracker,
            figures=ValidationLog(tracker.log_values, folder, progress.step, is_writer=is_writer),
            progress=progress,
            is_stopping=is_stopping,
            weight_sets=weight_sets,
        )
    ]


def check_disk(
    options: TrainingOptions, model: SdxlModel, learner: Learner, averages: Averages, plan: Plan, progress: Progress
) -> None:
    """Raise `UserError` unless the disk holds what the rest of this run saves."""
    model_bytes = bytes_of(model.networks, options.precision.save_dtype)
    state_bytes = bytes_of_state(options.optimizer, learner.trained.values(), options.precision.rounding)
    num_averages, num_widths = len(options.ema.profiles), len(options.ema.snapshot_widths)
    require_disk_for_saves(
        options.save,
        model_bytes=2 * model_bytes if options.ema.ema else model_bytes,
        state_bytes=state_bytes + averages.num_bytes,
        snapshot_bytes=averages.num_bytes // max(1, num_averages) * num_widths,
        snapshot_every=options.ema.ema_snapshot_every_n_steps,
        steps=range(progress.step + 1, plan.num_steps + 1),
        steps_per_epoch=plan.order.steps_per_epoch,
    )
