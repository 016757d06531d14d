"""When a model is saved, under which name, and which older one it replaces."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from library.config.atomic_files import CannotWrite
from library.config.errors import UserError
from library.config.messages import notify
from library.config.options import option
from library.training.state import STATE_SUFFIX

_WITHOUT_NAME = {"step": "at", "epoch": "epoch", "last": "last"}
"""What kohya's trainers call a model where no output name is given."""


RETRY_SECONDS = 60.0
"""How long a run that is over waits until it tries again to save what the disk did not take."""


@dataclass(frozen=True)
class Save:
    """One save: the name of model and state, and the names of those that go when it is complete."""

    name: str
    with_state: bool
    outdated: str | None = None
    outdated_state: str | None = None


@dataclass(frozen=True)
class SaveOptions:
    """What is saved, when and where."""

    _argument_group_name: ClassVar[str] = "Saving"

    output_dir: Path | None = option(None, "Folder for models and sample pictures.")
    output_name: str | None = option(None, "Name of the model, without suffix.")
    save_model_as: str | None = option(
        None,
        "Format; safetensors where not given, or diffusers if that is what the training started from.",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors", None),
    )
    save_every_n_steps: int | None = option(None, "Save after every n optimizer steps.")
    save_every_n_epochs: int | None = option(None, "Save after every n epochs.")
    save_last_n_steps: int | None = option(None, "Remove models saved more than this many steps ago.")
    save_last_n_epochs: int | None = option(None, "Keep this many of the models saved by epoch.")
    save_state: bool = option(False, "Save a state with every model: all that is needed to go on by --resume.")
    save_state_on_train_end: bool = option(False, "Save a state with the finished model.")
    save_last_n_steps_state: int | None = option(None, "As --save_last_n_steps, for states; the same if not given.")
    save_last_n_epochs_state: int | None = option(None, "As --save_last_n_epochs, for states; the same if not given.")

    @property
    def saves_state(self) -> bool:
        """Whether states are saved, if only at the end."""
        return self.save_state or self.save_state_on_train_end

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.output_dir is None:
            yield "--output_dir is missing: name the folder for the models."
        else:
            existing = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.exists())
            if not existing.is_dir():
                yield f"--output_dir: '{existing}' is a file; name a folder."
        if self.output_name is not None and Path(self.output_name).name != self.output_name:
            yield f"--output_name is '{self.output_name}'; it must be a name without folders (see --output_dir)."
        for unit in ("steps", "epochs"):
            every = f"save_every_n_{unit}"
            keeping = [f"save_last_n_{unit}", f"save_last_n_{unit}_state"]
            for flag in (every, *keeping):
                value = getattr(self, flag)
                if value is not None and value < 1:
                    yield f"--{flag} is {value}; it must be 1 or more."
            for flag in keeping:
                if getattr(self, flag) is not None and getattr(self, every) is None:
                    yield f"--{flag} needs --{every}."
            if getattr(self, keeping[1]) is not None and not self.save_state:
                yield f"--{keeping[1]} needs --save_state."

    def save_after_step(self, step: int) -> "Save | None":
        """What is saved after optimizer step `step` (from 1), if anything."""
        every = self.save_every_n_steps
        if every is None or step % every != 0:
            return None
        outdated = step_to_remove(step, every=every, keep=self.save_last_n_steps)
        keep_states = self.save_last_n_steps_state or self.save_last_n_steps
        outdated_state = step_to_remove(step, every=every, keep=keep_states)
        return self._save(partial(step_name, self.output_name), step, outdated, outdated_state)

    def save_after_epoch(self, epoch: int) -> "Save | None":
        """What is saved after epoch `epoch` (from 1) unless it is the last, if anything."""
        every = self.save_every_n_epochs
        if every is None or epoch % every != 0:
            return None
        outdated = epoch_to_remove(epoch, every=every, keep=self.save_last_n_epochs)
        keep_states = self.save_last_n_epochs_state or self.save_last_n_epochs
        outdated_state = epoch_to_remove(epoch, every=every, keep=keep_states)
        return self._save(partial(epoch_name, self.output_name), epoch, outdated, outdated_state)

    def save_at_end(self) -> "Save":
        """The finished model, and a state if the options ask for one at all."""
        return Save(last_name(self.output_name), with_state=self.saves_state)

    def save_at_stop(self, step: int) -> "Save":
        """Model and state of a run that is stopped after optimizer step `step`."""
        return Save(step_name(self.output_name, step), with_state=True)

    def _save(
        self, name_of: Callable[[int], str], count: int, outdated: int | None, outdated_state: int | None
    ) -> "Save":
        return Save(
            name_of(count),
            with_state=self.save_state,
            outdated=None if outdated is None else name_of(outdated),
            outdated_state=None if outdated_state is None or not self.save_state else name_of(outdated_state),
        )

    def format(self, *, source_is_diffusers: bool) -> str:
        """ "safetensors", "ckpt" or "diffusers"."""
        if self.save_model_as is None:
            return "diffusers" if source_is_diffusers else "safetensors"
        return self.save_model_as.removesuffix("_safetensors")


def step_name(output_name: str | None, step: int) -> str:
    """The name of the model saved after optimizer step `step` (from 1), without suffix."""
    return f"{output_name or _WITHOUT_NAME['step']}-step{step:08d}"


def epoch_name(output_name: str | None, epoch: int) -> str:
    """The name of the model saved after epoch number `epoch` (from 1), without suffix."""
    return f"{output_name or _WITHOUT_NAME['epoch']}-{epoch:06d}"


def last_name(output_name: str | None) -> str:
    """The name of the finished model, without suffix."""
    return output_name or _WITHOUT_NAME["last"]


def step_to_remove(step: int, *, every: int, keep: int | None) -> int | None:
    """The step whose model goes when that of `step` is complete: the newest one more than `keep` steps old."""
    if keep is None:
        return None
    outdated = step - keep - 1
    outdated -= outdated % every
    return outdated if outdated > 0 else None


def epoch_to_remove(epoch: int, *, every: int, keep: int | None) -> int | None:
    """The epoch whose model goes when that of `epoch` is complete, so that `keep` of them stay."""
    outdated = epoch - every * keep if keep is not None else 0
    return outdated if outdated > 0 else None


class Checkpoints:
    """Saves models and states when they are due; older ones are removed only when their successors are complete.

    `write_model(path)` and `write_state(folder)` write what is now; `suffix` is ".safetensors", ".ckpt" or "" for a
    diffusers folder. A save that fails while the run goes on (a full disk) is told to `say` and tried again when the
    next one is due; the one before it stays. When the run is over it is tried until it succeeds: what was learnt
    exists nowhere else.
    """

    def __init__(
        self,
        options: SaveOptions,
        suffix: str,
        write_model: Callable[[Path], None],
        write_state: Callable[[Path], None],
        say: Callable[[str], None],
    ):
        assert options.output_dir is not None  # checked by problems()
        self._options = options
        self._folder = options.output_dir
        self._suffix = suffix
        self._write_model = write_model
        self._write_state = write_state
        self._say = say
        self._failed: list[Save] = []  # what they were to remove goes with the next save that is complete
        self._present_state: Path | None = None  # the state of what is now, where there is one

    def after_resume(self, state: Path, step: int, epoch: int) -> None:
        """Remove what the run that saved `state`, after `step` steps and `epoch` epochs, had no time to remove."""
        self._present_state = state
        for save in (self._options.save_after_step(step), self._options.save_after_epoch(epoch)):
            if save is not None:
                self._remove_outdated(save)

    def after_step(self, step: int) -> None:
        """Save if the options ask for it after optimizer step `step` (from 1)."""
        self._present_state = None
        save = self._options.save_after_step(step)
        if save is not None:
            self._save_if_possible(save)

    def after_epoch(self, epoch: int, *, is_last: bool) -> None:
        """Save if the options ask for it after epoch `epoch` (from 1); the last is saved as the finished model."""
        save = self._options.save_after_epoch(epoch)
        if save is not None and not is_last:
            self._save_if_possible(save)

    def at_end(self) -> Path:
        """Save the finished model (and a state, if the options ask for it); gives the model's path."""
        return self._save_at_last(self._options.save_at_end())

    def at_stop(self, step: int) -> Path:
        """Save model and state where the run is stopped, after optimizer step `step`; gives the state's folder.

        Where a state of that step has just been saved, or the run was resumed from one, that is it.
        """
        if self._present_state is None:
            self._save_at_last(self._options.save_at_stop(step))
        assert self._present_state is not None  # this save has one
        return self._present_state

    def conclude(self, step: int, is_finished: bool) -> str:
        """Save what a run has learnt that has finished, or was stopped after `step`; gives what the user is told."""
        if is_finished:
            return f"saved '{self.at_end()}'"
        if step == 0:
            return "stopped before the first step: there is nothing to save"
        return f'stopped after step {step}; go on with the same command and --resume "{self.at_stop(step)}"'

    def _save_if_possible(self, save: Save) -> None:
        try:
            self._say(f"saved '{self._save(save)}'")
        except UserError as error:
            self._failed.append(save)
            self._say(f"'{save.name}' is not saved, the run goes on and tries again at the next save: {error}")

    def _save_at_last(self, save: Save) -> Path:
        said = ""
        while True:
            try:
                return self._save(save)
            except CannotWrite as error:
                if str(error) != said:
                    said = str(error)
                    self._say(f"'{save.name}' is not saved: {said} It is tried again every minute; Ctrl-C gives it up.")
                time.sleep(RETRY_SECONDS)

    def _save(self, save: Save) -> Path:
        # The model first: a run killed in between goes on from the state before, and writes the same model again.
        model, state = self._model(save.name), self._state(save.name)
        self._write_model(model)
        if save.with_state:
            self._write_state(state)
            self._present_state = state
        for each in (*self._failed, save):
            self._remove_outdated(each)
        self._failed.clear()
        return model

    def _remove_outdated(self, save: Save) -> None:
        if save.outdated is not None:
            _remove(self._model(save.outdated))
        if save.outdated_state is not None:
            _remove(self._state(save.outdated_state))

    def _model(self, name: str) -> Path:
        return self._folder / f"{name}{self._suffix}"

    def _state(self, name: str) -> Path:
        return self._folder / f"{name}{STATE_SUFFIX}"


def _remove(path: Path) -> None:
    """Remove a saved model; one that cannot go (Windows, while another program has it open) does not end the run."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        notify(f"'{path}' is kept, it cannot be removed: {error.strerror or error}.")
