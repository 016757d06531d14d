"""What models, averages and states are written from: by the main process, or by all of those that share weights."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from library.config.errors import listed
from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.sdxl.tensor_file import Replacing
from library.training.averages import Averages
from library.training.checkpoints import Checkpoints
from library.training.distribution import agreed, any_process, from_main, one_writer
from library.training.learner import Learner
from library.training.loss_watch import require_finite
from library.training.progress import Progress
from library.training.resumable import Resumable
from library.training.run_options import TrainingOptions
from library.training.saves import replaces
from library.training.sharding import gathered_weights
from library.training.state import write_state
from library.training.stopping import StopRequest
from library.training.tracking import Tracker
from library.training.uploads import Uploads

log = logging.getLogger(__name__)

WriteModel = Callable[[Path, Mapping[str, str], Replacing | None], None]
"""Writes the model with notes for its header, and with other tensors in the place of some."""


def make_checkpoints(
    options: TrainingOptions,
    model: SdxlModel,
    learner: Learner,
    learnt: Resumable,
    averages: Averages,
    progress: Progress,
    tracker: Tracker,
    state: Path | None,
    stop: StopRequest,
    header: Callable[[], dict[str, str]],
    uploads: Uploads,
) -> Checkpoints:
    """Return what saves models, in the format the options ask for, and states; saving is not timed as training."""
    source_is_diffusers = not Path(str(options.model.pretrained_model_name_or_path)).is_file()
    suffix = options.save.suffix(source_is_diffusers=source_is_diffusers)
    dtype = options.precision.save_dtype
    accelerator, is_sharded = learner.accelerator, learner.shards is not None

    if state is None and accelerator.is_main_process and not options.only_measures:
        _warn_of_replaced(options, suffix)

    def write(path: Path, notes: Mapping[str, str], replacing: Replacing | None) -> None:
        if not suffix:
            write_diffusers_folder(path, model, dtype, replacing)
        else:
            write_single_file(path, model, dtype, {**header(), **notes}, replacing)

    writes_model: WriteModel = partial(_write_gathered, write, learner, learnt.networks) if is_sharded else write

    def write_model(path: Path) -> None:
        with agreed(accelerator) if is_sharded else nullcontext():
            require_finite(learner.trained)
        with learner.final_weights():
            writes_model(path, {}, None)

    def write_average(path: Path) -> None:
        writes_model(path, {"ema.decay": f"{options.ema.ema_decay:g}"}, averages.replacing)

    def write_state_of(folder: Path, progress: Progress) -> None:
        learner.stepper.settle()  # an offloaded state may be on its way to host memory
        write_state(folder, replace(progress, losses=tracker.losses, num_images=tracker.num_images), learnt)

    return Checkpoints(
        options.save,
        progress,
        suffix=suffix,
        write_model=tracker.untimed()(write_model),
        write_state=tracker.untimed()(write_state_of),
        write_average=tracker.untimed()(write_average) if options.ema.ema else None,
        one_writer=_all_write if is_sharded else partial(one_writer, accelerator),
        from_main=partial(from_main, accelerator) if is_sharded else _called,
        removes=accelerator.is_main_process,
        waiting=stop.waiting,
        resumed_from=state,
        asked=stop.save_now.is_made,
        agree=partial(any_process, accelerator),
        tell=tracker.untimed()(uploads.add),
    )


def _warn_of_replaced(options: TrainingOptions, suffix: str) -> None:
    """Name what an earlier run has left under the names of this one, which begins."""
    replaced = [
        f"'{path.name}'"
        for path in sorted(options.output_dir.glob("*"))
        if replaces(options.save, path.name, suffix, has_average=options.ema.ema)
    ]
    if replaced:
        log.warning(
            "%d models and states of an earlier run in '%s' are replaced when this one saves its own: %s. Another "
            "--output_name keeps them; --resume latest continues that run if it has left a state.",
            len(replaced),
            options.output_dir,
            listed(replaced),
        )


def _write_gathered(
    write: WriteModel,
    learner: Learner,
    networks: Mapping[str, nn.Module],
    path: Path,
    notes: Mapping[str, str],
    replacing: Replacing | None,
) -> None:
    """Gather sharded weights from all processes, which call this together, and write the model in the main one."""
    whole = gathered_weights(networks.values(), replacing)
    with agreed(learner.accelerator):
        if learner.accelerator.is_main_process:
            write(path, notes, whole)


def _all_write() -> AbstractContextManager[bool]:
    return nullcontext(True)


def _called(make: Callable[[], Path]) -> Path:
    return make()
