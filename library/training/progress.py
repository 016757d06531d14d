"""Where a run is, and the part of a saved state that says so: read without torch, before anything is loaded."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.config.errors import UserError

log = logging.getLogger(__name__)

STATE_FORMAT = 1
STATE_SUFFIX = "-state"
LATEST = "latest"

PROGRESS_FILE = "progress.json"
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class Setting:
    """What a run is made of: its flags as text, a fingerprint of each image by key, the versions of the libraries."""

    options: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is. No random generator is part of it: all of them start at each step, from the seed and the step.

    `started` is when the run began; its log folder and sample images are named after it. `step` counts optimizer steps
    from the start of the run, `epoch` (from 0) the epochs before the current one and `step_in_epoch` the steps done in
    the current one: all of its steps where the epoch is over and what is due after it is not saved yet. `losses` are
    those of the moving average.
    """

    started: str = ""
    seed: int = 0
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    setting: Setting = field(default_factory=Setting)

    def advance(self) -> None:
        """Count one more optimizer step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1

    def in_next_epoch(self) -> "Progress":
        """Return the same place, counted from the beginning of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step_in_epoch=0)


def read_progress(folder: Path) -> Progress:
    """Return where the run of a state was. Raise `UserError` if the folder is not a complete state."""
    _, progress = _read(folder)
    return progress


def find_state(resume: str, output_dir: Path, output_name: str | None) -> Path:
    """Return the state that `--resume` names: a folder, or for "latest" the newest complete one of `output_name`.

    Raise `UserError` if there is none. Damaged states in `output_dir` are named and skipped.
    """
    if resume != LATEST:
        if not Path(resume).is_dir():
            raise UserError(f"--resume: there is no folder '{resume}'.", "Give a state, or 'latest'.")
        return Path(resume)
    found = []
    for folder in output_dir.glob(f"*{STATE_SUFFIX}"):
        try:
            written, progress = _read(folder)
        except UserError as error:
            log.warning("%s It is skipped.", error.problem)
            continue
        if progress.setting.options.get("output_name", str(output_name)) == str(output_name):
            found.append((written, progress.step, folder))
    if not found:
        raise UserError(
            f"--resume latest: '{output_dir}' holds no complete state of a run with the same --output_name.",
            "Train with --save_state first, or name the folder of a state.",
        )
    return max(found)[-1]


def is_state(path: Path) -> bool:
    """Return whether `path` is the folder of a state, complete or not, or the file of its weights."""
    folder = path.parent if path.name == WEIGHTS_FILE else path
    try:
        return (folder / PROGRESS_FILE).is_file()
    except OSError:  # no file system takes that for a name
        return False


def _read(folder: Path) -> tuple[str, Progress]:
    """Return when a state was written, and its progress."""
    try:
        content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        if content.pop("format") != STATE_FORMAT:
            raise ValueError("it is of another version of this program")
        written, sizes = str(content.pop("written")), content.pop("bytes")
        _require_sizes(folder, sizes)
        return written, Progress(**{**content, "setting": Setting(**content["setting"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"'{folder}' is not a complete state of this program ({error}).",
            "Give a folder written by --save_state; states of other trainers cannot be resumed.",
        ) from error


def _require_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name} is cut short")
