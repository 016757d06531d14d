"""When a model is saved, under which name, and which older one it replaces."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from library.config.options import option

_WITHOUT_NAME = {"step": "at", "epoch": "epoch", "last": "last"}
"""What kohya's trainers call a model where no output name is given."""


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
            every, last = getattr(self, f"save_every_n_{unit}"), getattr(self, f"save_last_n_{unit}")
            for flag, value in ((f"save_every_n_{unit}", every), (f"save_last_n_{unit}", last)):
                if value is not None and value < 1:
                    yield f"--{flag} is {value}; it must be 1 or more."
            if last is not None and every is None:
                yield f"--save_last_n_{unit} needs --save_every_n_{unit}."

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
    """Saves the model when it is due; an older one is removed only when its successor is complete.

    `write(path)` writes the model as it is now; `suffix` is ".safetensors", ".ckpt" or "" for a diffusers folder.
    """

    def __init__(self, options: SaveOptions, suffix: str, write: Callable[[Path], None]):
        assert options.output_dir is not None  # checked by problems()
        self._options = options
        self._folder = options.output_dir
        self._suffix = suffix
        self._write = write

    def after_step(self, step: int) -> None:
        """Save if the options ask for it after optimizer step `step` (from 1)."""
        every = self._options.save_every_n_steps
        if every is None or step % every != 0:
            return
        outdated = step_to_remove(step, every=every, keep=self._options.save_last_n_steps)
        name = self._options.output_name
        self._save(step_name(name, step), None if outdated is None else step_name(name, outdated))

    def after_epoch(self, epoch: int, *, is_last: bool) -> None:
        """Save if the options ask for it after epoch `epoch` (from 1); the last is saved as the finished model."""
        every = self._options.save_every_n_epochs
        if every is None or epoch % every != 0 or is_last:
            return
        outdated = epoch_to_remove(epoch, every=every, keep=self._options.save_last_n_epochs)
        name = self._options.output_name
        self._save(epoch_name(name, epoch), None if outdated is None else epoch_name(name, outdated))

    def at_end(self) -> Path:
        """Save the finished model; gives its path."""
        return self._save(last_name(self._options.output_name), None)

    def _save(self, name: str, outdated: str | None) -> Path:
        path = self._folder / f"{name}{self._suffix}"
        self._write(path)
        if outdated is not None:
            _remove(self._folder / f"{outdated}{self._suffix}")
        return path


def _remove(path: Path) -> None:
    """Remove a saved model; one that cannot go (Windows, while another program has it open) does not end the run."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        tqdm.write(f"'{path}' is kept, it cannot be removed: {error.strerror or error}.", file=sys.stderr)
