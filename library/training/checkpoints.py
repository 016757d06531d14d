"""Save models and states when they are due, and remove the ones they replace."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from library.config.atomic_files import CannotWrite, new_folder
from library.config.errors import UserError
from library.sdxl.tensor_file import DoesNotFit
from library.training.plan import Occasion
from library.training.progress import STATE_SUFFIX, Progress, newest_state
from library.training.saves import Save, SaveOptions, average_name

log = logging.getLogger(__name__)

SECONDS_OF_MINUTE = 60.0
_ELSEWHERE = "saved-elsewhere-"
RETRY_SECONDS = 60.0
"""How long a run that is over waits before it tries again to save what did not fit on the disk."""


class Checkpoints:
    """Saves models and states when they are due; older ones are removed only when their successors are complete.

    `write_model(path)` and `write_state(folder, progress)` write the current weights; `suffix` is ".safetensors",
    ".ckpt" or "" for a diffusers folder. `write_average(path)`, if there is one, writes their moving average, beside
    each model and removed with it. Every process calls the events; within `one_writer()` one of them writes.
    `asked()` says whether the user asks for a save now; `agree(flag)` is true in every process if the flag is in one.
    `tell(path)` is called with each model and state that is complete. Where all processes write, one of them `removes`,
    and `from_main(make)` returns what `make` does in the main one.

    A save that fails while the run continues (a full disk) is reported and tried again when the next one is due; the
    one before it stays. When the run is over it is tried until it succeeds, since what was learnt exists nowhere else,
    or until a signal ends the process within `waiting()`. Where no later attempt can succeed, it is saved elsewhere.
    """

    def __init__(
        self,
        options: SaveOptions,
        progress: Progress,
        *,
        suffix: str,
        write_model: Callable[[Path], None],
        write_state: Callable[[Path, Progress], None],
        write_average: Callable[[Path], None] | None = None,
        one_writer: Callable[[], AbstractContextManager[bool]],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        resumed_from: Path | None = None,
        asked: Callable[[], bool] = bool,
        agree: Callable[[bool], bool] = bool,
        tell: Callable[[Path], None] = lambda path: None,
        from_main: Callable[[Callable[[], Path]], Path] = lambda make: make(),
        removes: bool = True,
    ):
        assert options.output_dir is not None  # checked by problems()
        self._options = options
        self._progress = progress
        self._folder = options.output_dir
        self._suffix = suffix
        self._write_model = write_model
        self._write_state = write_state
        self._write_average = write_average
        self._one_writer = one_writer
        self._waiting = waiting
        self._asked = asked
        self._agree = agree
        self._tell = tell
        self._from_main = from_main
        self._removes = removes
        self._last_state_at = time.monotonic()
        self._untold: list[Path] = []
        self.written: dict[Path, None] = {}  # models and states of this run that are still there, in their order
        self._failed: list[Save] = []  # what they were to remove goes with the next save that is complete
        self._newest_state, self._step_of_newest = resumed_from, progress.step

    @property
    def folder(self) -> Path:
        """Where models and states are saved."""
        return self._folder

    def after_step(self, occasion: Occasion, report: object = None) -> None:
        """Save what is due on this occasion; the last one saves the final model."""
        is_step = occasion.step > 0 and not occasion.is_resumed
        is_asked = is_step and self._agree(self._asked())
        saves = self._due(occasion, is_asked=is_asked)
        if occasion.step == 0 or not (saves or occasion.is_last or occasion.is_resumed):
            return  # where nothing is trained, the last step is number 0
        if any(save.with_state for save, _ in saves):
            self._last_state_at = time.monotonic()
        with self._one_writer() as writes:
            if not writes:
                return
            if occasion.is_resumed:
                self._remove_what_a_killed_run_left(occasion)
            for save, progress in saves:
                self._save_if_possible(save, progress)
            if occasion.is_last:
                save = self._options.save_at_end()
                self._save_at_last(replace(save, with_state=save.with_state or is_asked))

    def at_stop(self) -> str:
        """Save model and state of a run that is stopped before its end; return what the user is told.

        A state of this step that was just saved, or from which the run was resumed, is not saved a second time.
        """
        step = self._progress.step
        with self._one_writer() as writes:
            if step == 0:
                return "Training stopped before the first step: there is nothing to save."
            if writes:
                self.save_present()
        return f'Training stopped after step {step}. Continue with the same command and --resume "{self._newest_state}"'

    def save_present(self) -> Path:
        """Save model and state as they are unless there is a state of this step; return its folder.

        Only the process that writes calls it.
        """
        if self._newest_state is None or self._step_of_newest != self._progress.step:
            self._save_at_last(self._options.save_at_stop(self._progress.step))
        assert self._newest_state is not None  # this save has one
        return self._newest_state

    def after_error(self, *, can_save: bool) -> str | None:
        """Save as `save_present` unless the weights are in the middle of a step; return what the user is told.

        A GPU that has failed cannot be read any more: then the newest state on the disk is named.
        """
        step = self._progress.step
        if can_save:
            try:
                return f'All that was learnt in {step} steps is saved; continue with --resume "{self.save_present()}"'
            except Exception as error:  # noqa: BLE001 (the first error is the one to report)
                log.warning("what was learnt since the last state cannot be saved: %s", str(error).partition("\n")[0])
        state = newest_state(self._folder, self._options.output_name)
        return None if state is None else f'Continue from the newest state with --resume "{state}"'

    def _due(self, occasion: Occasion, *, is_asked: bool) -> list[tuple[Save, Progress]]:
        """Return the saves of this occasion, each with the progress that its state records.

        With `is_asked` the user wants a model and a state now; after the last step the final model is that.
        """
        if occasion.step == 0:
            return []
        # A state that was saved after the last step of an epoch leaves the saves of the epoch to the resumed run.
        epoch_is_saved = occasion.is_resumed and self._progress.step_in_epoch == 0
        by_step = None if occasion.is_resumed else self._options.save_after_step(occasion.step)
        by_epoch = None
        if occasion.epoch_ended is not None and not occasion.is_last and not epoch_is_saved:
            by_epoch = self._options.save_after_epoch(occasion.epoch_ended)
        if is_asked and not occasion.is_last:
            by_step = replace(by_step or self._options.save_at_stop(occasion.step), with_state=True)
        saves = [(by_step, self._progress)] if by_step is not None else []
        saves += [(by_epoch, self._progress.in_next_epoch())] if by_epoch is not None else []
        has_state = occasion.is_resumed or occasion.is_last or any(save.with_state for save, _ in saves)
        if not has_state and self._minutes_are_over():
            saves.append((self._options.save_of_minutes(), self._progress))
        return saves

    def _minutes_are_over(self) -> bool:
        minutes = self._options.save_every_n_minutes
        if minutes is None:
            return False
        return self._agree(time.monotonic() - self._last_state_at >= SECONDS_OF_MINUTE * minutes)

    def _remove_what_a_killed_run_left(self, occasion: Occasion) -> None:
        """Remove what the run that saved the resumed state had no time to remove."""
        epoch = None if occasion.is_last else self._progress.epoch  # the last step has no save of its epoch
        for save in (self._options.save_after_step(occasion.step), epoch and self._options.save_after_epoch(epoch)):
            if save:
                self._remove_outdated(save)

    def _save_if_possible(self, save: Save, progress: Progress) -> None:
        try:
            self._save(save, progress)
        except UserError as error:
            self._failed.append(save)
            log.warning("'%s' is not saved. Training continues and tries again at the next save: %s", save.name, error)

    def _save_at_last(self, save: Save) -> None:
        reported = ""
        while True:
            try:
                self._save(save, self._progress)
                return
            except DoesNotFit:
                if not save.with_state:
                    self._save_state(save, self._progress)
                raise
            except CannotWrite as error:
                if not error.is_temporary:
                    raise self._saved_elsewhere(save, error) from error
                if str(error) != reported:
                    reported = str(error)
                    log.warning(
                        "'%s' is not saved: %s Saving is tried again every minute;"
                        " Ctrl-C or SIGTERM ends the run without it.",
                        save.name,
                        reported,
                    )
                with self._waiting():
                    time.sleep(RETRY_SECONDS)

    def _saved_elsewhere(self, save: Save, refusal: CannotWrite) -> UserError:
        """Save in a new folder, here or among the system's temporary files; return the error that says so."""
        for parent in (self._folder, Path(tempfile.gettempdir())):
            try:
                self._folder = self._from_main(partial(new_folder, parent, _ELSEWHERE))
                model = self._save(replace(save, outdated=None, outdated_state=None), self._progress)
            except CannotWrite as error:
                log.warning("'%s' cannot be saved in '%s' either: %s", save.name, parent, error)
                continue
            return UserError(refusal.problem, f"The model is saved as '{model}' instead. {refusal.remedy}")
        return refusal

    def _save(self, save: Save, progress: Progress) -> Path:
        try:
            return self._write(save, progress)
        finally:  # model and state are safe before anybody is told, who may take long over them
            told, self._untold = self._untold, []
            for path in told:
                self._tell(path)

    def _write(self, save: Save, progress: Progress) -> Path:
        # The model first: a run killed in between continues from the state before, and writes the same model again.
        model, state = self._model(save.name), self._state(save.name)
        log.info("saving '%s'", model.name)
        try:
            self._write_model(model)
            self._note(model)
            if self._write_average is not None:
                average = self._average(save.name)
                log.info("saving '%s'", average.name)
                self._write_average(average)
                self._note(average)
        except DoesNotFit:
            if save.with_state:  # which has the precision of training
                self._save_state(save, progress)
                self._remove_outdated(replace(save, outdated=None))
            raise
        if save.with_state:
            self._save_state(save, progress)
        for each in (*self._failed, save):
            self._remove_outdated(each)
        self._failed.clear()
        log.info("saved '%s'%s", model, f" and '{state}'" if save.with_state else "")
        return model

    def _save_state(self, save: Save, progress: Progress) -> None:
        state = self._state(save.name)
        log.info("saving '%s'", state.name)
        self._progress.num_states += 1
        self._write_state(state, replace(progress, num_states=self._progress.num_states))
        self._newest_state, self._step_of_newest = state, progress.step
        self._note(state)

    def _note(self, path: Path) -> None:
        self.written[path] = None
        self._untold.append(path)

    def _remove_outdated(self, save: Save) -> None:
        outdated = [] if save.outdated is None else [self._model(save.outdated)]
        if save.outdated is not None and self._write_average is not None:
            outdated.append(self._average(save.outdated))
        outdated += [] if save.outdated_state is None else [self._state(save.outdated_state)]
        for path in outdated:
            self.written.pop(path, None)
            if self._removes:
                _remove(path)

    def _model(self, name: str) -> Path:
        return self._folder / f"{name}{self._suffix}"

    def _average(self, name: str) -> Path:
        return self._model(average_name(name))

    def _state(self, name: str) -> Path:
        return self._folder / f"{name}{STATE_SUFFIX}"


def _remove(path: Path) -> None:
    """Remove a saved model; one that another program has open (Windows) does not end the run."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("'%s' cannot be removed and is kept: %s.", path, error.strerror or error)
