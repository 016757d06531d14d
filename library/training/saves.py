"""Which saves are due, under which names, and which older ones they replace."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from library.config.errors import UserError
from library.config.file_names import name_problem, require_writable_name
from library.config.magnitudes import MOST_STEPS
from library.config.options import option
from library.training.progress import STATE_SUFFIX, is_state

_WITHOUT_NAME = {"step": "at", "epoch": "epoch", "last": "last"}
"""Prefixes that kohya's trainers use if no output name is given."""
_SUFFIXES = (".safetensors", ".ckpt")
AVERAGE_MARK = "_ema"
"""At the end of the names of models, and of sample images, of the moving average of the weights."""


@dataclass(frozen=True)
class Save:
    """One save: the name of model and state, and the names of those removed once it is complete."""

    name: str
    with_state: bool
    outdated: str | None = None
    outdated_state: str | None = None


@dataclass(frozen=True)
class SaveOptions:
    """What is saved, when and where."""

    _argument_group_name: ClassVar[str] = "Saving"

    output_dir: Path | None = option(None, "Folder for models and sample images.")
    output_name: str | None = option(None, "Name of the saved model, without suffix.")
    save_model_as: str | None = option(
        None,
        "Format of saved models. Default: diffusers if training starts from a diffusers model, else safetensors.",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors", None),
    )
    save_every_n_steps: int | None = option(None, "Save after every n optimizer steps.", least=1, most=MOST_STEPS)
    save_every_n_epochs: int | None = option(None, "Save after every n epochs.", least=1, most=MOST_STEPS)
    save_every_n_minutes: int | None = option(
        None,
        "Save model and state after the first step that ends this many minutes after the last state was saved, under "
        "the name NAME-recent. Each such save replaces the one before.",
        least=1,
        most=MOST_STEPS,
    )
    save_n_epoch_ratio: int | None = option(
        None,
        "Save at least this many models, after equal numbers of epochs; overrides --save_every_n_epochs.",
        least=1,
        most=MOST_STEPS,
    )
    save_last_n_steps: int | None = option(
        None,
        "Keep models of the last n steps: each save removes those more than n steps older. Steps, not files: with "
        "--save_every_n_steps=100, 200 keeps three models.",
        least=1,
        most=MOST_STEPS,
    )
    save_last_n_epochs: int | None = option(
        None, "Keep the last n models saved by epoch; remove older ones.", least=1, most=MOST_STEPS
    )
    save_state: bool = option(False, "Save the training state with every model, to continue with --resume.")
    save_state_on_train_end: bool = option(False, "Save the training state with the final model.")
    save_last_n_steps_state: int | None = option(
        None, "Like --save_last_n_steps, for states. Default: --save_last_n_steps.", least=1, most=MOST_STEPS
    )
    save_last_n_epochs_state: int | None = option(
        None, "Like --save_last_n_epochs, for states. Default: --save_last_n_epochs.", least=1, most=MOST_STEPS
    )

    @property
    def saves_state(self) -> bool:
        """Whether states are saved with models."""
        return self.save_state or self.save_state_on_train_end

    @property
    def has_states(self) -> bool:
        """Whether states are saved at all, be it with models or by the clock."""
        return self.saves_state or self.save_every_n_minutes is not None

    def for_epochs(self, num_epochs: int) -> "SaveOptions":
        """Return the options of a run of `num_epochs`, with the epochs between saves that a ratio asks for."""
        if self.save_n_epoch_ratio is None:
            return self
        return replace(self, save_every_n_epochs=max(1, num_epochs // self.save_n_epoch_ratio))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.output_dir is None:
            yield "--output_dir is missing: name the folder for the models."
        else:
            existing = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.exists())
            if not existing.is_dir():
                yield f"--output_dir: '{existing}' is a file; name a folder."
        if self.output_name is not None and (problem := name_problem(self.output_name)):
            yield f"--output_name is '{self.output_name}': {problem}. Choose another name; --output_dir names folders."
        for unit in ("steps", "epochs"):
            every = f"save_every_n_{unit}"
            keeping = [f"save_last_n_{unit}", f"save_last_n_{unit}_state"]
            has_saves = getattr(self, every) is not None or (unit == "epochs" and self.save_n_epoch_ratio is not None)
            for flag in keeping:
                if getattr(self, flag) is not None and not has_saves:
                    yield f"--{flag} needs --{every}."
            if getattr(self, keeping[1]) is not None and not self.save_state:
                yield f"--{keeping[1]} needs --save_state."

    def heavy_problems(self) -> Iterator[str]:
        """Yield why models and states cannot be written under these names: they are tried."""
        assert self.output_dir is not None  # checked by problems()
        what = "the name of models" if self.output_name is None else "--output_name"
        suffixes = (f"-step{0:08d}{STATE_SUFFIX}", ".safetensors")
        try:
            require_writable_name(self.output_dir, last_name(self.output_name), what, suffixes)
        except UserError as error:
            yield str(error)

    def save_after_step(self, step: int) -> "Save | None":
        """Return what is saved after optimizer step `step` (from 1), if anything."""
        every = self.save_every_n_steps
        if every is None or step % every != 0:
            return None
        outdated = step_to_remove(step, every=every, keep=self.save_last_n_steps)
        keep_states = self.save_last_n_steps_state or self.save_last_n_steps
        outdated_state = step_to_remove(step, every=every, keep=keep_states)
        return self._save(partial(step_name, self.output_name), step, outdated, outdated_state)

    def save_after_epoch(self, epoch: int) -> "Save | None":
        """Return what is saved after epoch `epoch` (from 1), if anything; after the last one the final model is."""
        every = self.save_every_n_epochs
        if every is None or epoch % every != 0:
            return None
        outdated = epoch_to_remove(epoch, every=every, keep=self.save_last_n_epochs)
        keep_states = self.save_last_n_epochs_state or self.save_last_n_epochs
        outdated_state = epoch_to_remove(epoch, every=every, keep=keep_states)
        return self._save(partial(epoch_name, self.output_name), epoch, outdated, outdated_state)

    def save_at_end(self) -> "Save":
        """Return the save of the final model, with a state if the options ask for any state."""
        return Save(last_name(self.output_name), with_state=self.saves_state)

    def save_at_stop(self, step: int) -> "Save":
        """Return the save of a run stopped after optimizer step `step`, or asked to save there: model and state."""
        return Save(step_name(self.output_name, step), with_state=True)

    def save_of_minutes(self) -> "Save":
        """Return the save of `save_every_n_minutes`: model and state, under a name that stays the same."""
        return Save(recent_name(self.output_name), with_state=True)

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
        """Return "safetensors", "ckpt" or "diffusers"."""
        if self.save_model_as is None:
            return "diffusers" if source_is_diffusers else "safetensors"
        return self.save_model_as.removesuffix("_safetensors")

    def suffix(self, *, source_is_diffusers: bool) -> str:
        """Return the suffix of models: ".safetensors", ".ckpt", or "" for diffusers folders."""
        file_format = self.format(source_is_diffusers=source_is_diffusers)
        return "" if file_format == "diffusers" else f".{file_format}"


def step_name(output_name: str | None, step: int) -> str:
    """Return the name of the model saved after optimizer step `step` (from 1), without suffix."""
    return f"{output_name or _WITHOUT_NAME['step']}-step{step:08d}"


def step_of(file_name: str) -> int | None:
    """Return the step in the name of a model or state that `step_name` made, None for any other."""
    match = re.search(r"-step([0-9]{8,})(?![0-9])", file_name)
    return None if match is None else int(match[1])


def epoch_name(output_name: str | None, epoch: int) -> str:
    """Return the name of the model saved after epoch `epoch` (from 1), without suffix."""
    return f"{output_name or _WITHOUT_NAME['epoch']}-{epoch:06d}"


def recent_name(output_name: str | None) -> str:
    """Return the name of the model of `--save_every_n_minutes`, without suffix."""
    return "recent" if output_name is None else f"{output_name}-recent"


def is_counted(options: SaveOptions, file_name: str) -> bool:
    """Return whether a file or folder is a model or state that the run replaces or removes when its turn comes.

    What was saved at a stop or on request between two saves stays. Moving averages, beside models, are not counted.
    """
    by_step, by_epoch = (re.escape(name(options.output_name, 0).rstrip("0")) for name in (step_name, epoch_name))
    ending = rf"({re.escape(STATE_SUFFIX)}|\.[a-z]+)?"
    for name, every in (
        (f"{by_step}([0-9]{{8,}})", options.save_every_n_steps),
        (f"{by_epoch}([0-9]{{6,}})", options.save_every_n_epochs),
    ):
        match = re.fullmatch(name + ending, file_name)
        if match is not None and every is not None and int(match[1]) % every == 0:
            return True
    return False


def replaces(options: SaveOptions, file_name: str, suffix: str, *, has_average: bool) -> bool:
    """Return whether a run that begins writes over a file or folder of its output folder, or removes it.

    `suffix` is that of its models, "" for diffusers folders; `has_average` says that averages lie beside them.
    """
    is_state = file_name.endswith(STATE_SUFFIX)
    if is_state:
        stem = file_name.removesuffix(STATE_SUFFIX)
    elif file_name.endswith(suffix) and (suffix or not file_name.endswith(_SUFFIXES)):
        stem = file_name.removesuffix(suffix)
        stem = stem.removesuffix(AVERAGE_MARK) if has_average else stem
    else:
        return False
    if options.save_every_n_minutes is not None and stem == recent_name(options.output_name):
        return True
    is_saved = options.saves_state or not is_state
    return is_saved and (stem == last_name(options.output_name) or is_counted(options, stem))


def source_conflicts(
    options: SaveOptions, sources: Mapping[str, str | None], *, has_average: bool, is_measured: bool
) -> Iterator[str]:
    """Yield why a run cannot start from one of its `sources`, by the name of the flag: models that it reads.

    It is a state, or the run would write its own model in that place, which one that only measures does not.
    """
    paths = {flag: Path(source) for flag, source in sources.items() if source is not None}
    model = paths.get("pretrained_model_name_or_path")
    suffix = options.suffix(source_is_diffusers=model is not None and not os.path.isfile(model))  # noqa: PTH113
    for flag, path in paths.items():
        if is_state(path):
            yield (
                f"--{flag}: '{path}' is a saved training state, not a model. Pass the base model here and the state "
                "with --resume."
            )
            continue
        is_replaced = replaces(options, path.name, suffix, has_average=has_average)
        if is_replaced and not is_measured and _lies_in(path, options.output_dir):
            yield (
                f"--{flag}: the run would write its own model over '{path}'. Set another --output_name or --output_dir."
            )


def _lies_in(path: Path, folder: Path | None) -> bool:
    try:
        return folder is not None and path.exists() and path.absolute().parent.samefile(folder)
    except OSError:  # there is no such folder, or no file system takes that for a name
        return False


def may_be_of(output_name: str | None, file_name: str) -> bool:
    """Return whether a file or folder has a name that models and states of `output_name` have."""
    stems = ("recent", *_WITHOUT_NAME.values()) if output_name is None else (output_name,)
    return any(file_name == stem or file_name.startswith((f"{stem}-", f"{stem}.", f"{stem}_")) for stem in stems)


def average_name(name: str) -> str:
    """Return the name of the model of the moving average beside the model `name`, both without suffix."""
    return f"{name}{AVERAGE_MARK}"


def last_name(output_name: str | None) -> str:
    """Return the name of the final model, without suffix."""
    return output_name or _WITHOUT_NAME["last"]


def step_to_remove(step: int, *, every: int, keep: int | None) -> int | None:
    """Return the step whose model is removed after the save of `step`: the newest one more than `keep` steps older."""
    if keep is None:
        return None
    outdated = step - keep - 1
    outdated -= outdated % every
    return outdated if outdated > 0 else None


def epoch_to_remove(epoch: int, *, every: int, keep: int | None) -> int | None:
    """Return the epoch whose model is removed after the save of `epoch`, so that `keep` models stay."""
    outdated = epoch - every * keep if keep is not None else 0
    return outdated if outdated > 0 else None
