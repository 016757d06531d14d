"""Where a run starts: at its beginning or at a saved state, at an older one where the newest is damaged."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from library.config.leftovers import remove_leftovers
from library.data.subsets import Subset, described_subsets
from library.samples.picture_files import SAMPLE_FOLDER
from library.training.accelerator import draw_seed
from library.training.distribution import any_process, main_process_first, require_alike
from library.training.ema_snapshots import snapshot_folder
from library.training.progress import (
    BY_IMAGE,
    LATEST,
    DamagedState,
    Progress,
    Setting,
    find_state,
    num_states,
    read_progress,
)
from library.training.resumable import Resumable
from library.training.resume import check_options, flat_options, library_versions
from library.training.run_options import TrainingOptions
from library.training.run_record import RECORD_FOLDER
from library.training.state import read_learnt

log = logging.getLogger(__name__)

Begun = TypeVar("Begun")


def starting_point(
    options: TrainingOptions, subsets: Sequence[Subset], accelerator: Accelerator, damaged: Sequence[Path]
) -> tuple[Path | None, Progress]:
    """Return the state to resume from, if any, and the progress of the run; remove what killed runs left behind.

    `damaged` are states that cannot be used. Raise `UserError` where there is no other, or where it belongs to another
    run.
    """
    flat = flat_options(options, described_subsets(subsets), num_processes=accelerator.num_processes)
    setting = Setting(flat, versions=library_versions())
    require_alike(accelerator, "options", flat)
    require_alike(accelerator, "versions", setting.versions)
    where = options.output_dir, options.save.output_name
    with main_process_first(accelerator):
        if accelerator.is_main_process:
            logs = [] if options.tracking.logging_dir is None else [options.tracking.logging_dir]
            folders = [options.output_dir / name for name in (SAMPLE_FOLDER, RECORD_FOLDER)]
            remove_leftovers(options.output_dir, *folders, snapshot_folder(*where), *logs)
        wanted = options.resume.resume
        state = None if wanted is None else find_state(wanted, *where, damaged)
    require_alike(accelerator, "states", {"state": str(state)})
    if state is None:
        seed = draw_seed(accelerator) if options.run.seed is None else options.run.seed
        started = datetime.now().isoformat(timespec="seconds")
        return None, Progress(started, seed, num_states=num_states(*where), setting=_with_seed(setting, seed))
    progress = read_progress(state)
    then = _with_seed(progress.setting, progress.seed)
    progress.seed = progress.seed if options.run.seed is None else options.run.seed
    now = _with_seed(setting, progress.seed)
    by_image = progress.noise_by == BY_IMAGE
    changes = check_options(then, now, anyway=options.resume.resume_anyway, splits_alike=by_image)
    if not by_image:
        changes.append("its noise is a function of step and process, as in the version that began this run")
    log.info("\n  ".join([f"resuming after step {progress.step} from '{state}'", *changes]))
    progress.setting = replace(now, images=progress.setting.images, validation=progress.setting.validation)
    progress.num_states = max(progress.num_states, num_states(*where))
    return state, progress


def without_damaged_states(begin: Callable[[Sequence[Path]], Begun], resume: str | None) -> Begun:
    """Return `begin(damaged)`, called again with each state that `--resume latest` has found to be damaged.

    The weights of a state are read, and so checked, when everything else is built, which depends on its progress.
    """
    damaged: list[Path] = []
    while True:
        try:
            return begin(damaged)
        except DamagedState as error:
            if resume != LATEST or error.folder in damaged:
                raise
            damaged.append(error.folder)
            log.warning("%s It is skipped.", error.problem)


def load_state(folder: Path, learnt: Resumable, accelerator: Accelerator) -> None:
    """Load a state into `learnt`, in every process or in none. Raise as `read_learnt`."""
    damage = None
    try:
        read_learnt(folder, learnt)
    except DamagedState as error:
        damage = error
    if any_process(accelerator, damage is not None):
        raise damage or DamagedState(folder, "another process could not read it as it was written")


def _with_seed(setting: Setting, seed: int) -> Setting:
    """Return the setting with the seed that is used: where none is given it is drawn, or that of the state."""
    return replace(setting, options=setting.options | {"seed": str(seed)})
