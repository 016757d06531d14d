"""Where a run is, and the part of a saved state that says so: read without torch, before anything is loaded."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.config.digests import digest
from library.config.errors import UserError, listed

log = logging.getLogger(__name__)

STATE_FORMAT = 2
FORMAT_WITHOUT_DIGESTS = 1
STATE_SUFFIX = "-state"
LATEST = "latest"

PROGRESS_FILE = "progress.json"
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
SHARD_PREFIX = "shard-"
"""Begins the names of files that hold the parts of several processes, in place of that of the weights."""

BY_IMAGE, BY_STEP = "image", "step"
"""Rules of what the noise of a run is a function of: each visit of an image, or step and process as once."""

_NO_DIGEST = "0" * 32
"""Stands for the digest of a progress file while that is computed."""


class DamagedState(UserError):
    """The state in `folder` is not what was written."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"'{folder}' is damaged: {reason}.", "Resume from an older state, or from a copy of this one.")
        self.folder = folder


@dataclass(frozen=True)
class Setting:
    """What a run is made of: its flags as text, a fingerprint of each image by key, the versions of the libraries.

    `validation` has the fingerprints of the images that are measured and not trained.
    """

    options: dict[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    validation: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is. No random generator is part of it: all of them start at each step, from the seed and the step.

    `started` is when the run began; its log folder and sample images are named after it. `step` counts optimizer steps
    from the start of the run, `epoch` (from 0) the epochs before the current one and `step_in_epoch` the steps done in
    the current one: all of its steps where the epoch is over and what is due after it is not saved yet. `losses` are
    those of the moving average. `num_images` counts the images seen; it is 0 in states of earlier versions.
    `num_states` counts the states of this name in the order in which they were written, over all runs into one folder:
    clocks can be set back. `validated_step` is the step of the last validation. `noise_by` is the rule by which noise
    is drawn: a run keeps the one that it began with.
    """

    started: str = ""
    seed: int = 0
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    num_images: int = 0
    num_states: int = 0
    setting: Setting = field(default_factory=Setting)
    validated_step: int | None = None
    noise_by: str = BY_IMAGE

    def advance(self) -> None:
        """Count one more optimizer step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1

    def in_next_epoch(self) -> "Progress":
        """Return the same place, counted from the beginning of the next epoch."""
        return replace(self, epoch=self.epoch + 1, step_in_epoch=0)


@dataclass(frozen=True)
class StateRecord:
    """The progress file of a state: its progress, and the size and digest of each other file by name.

    States of earlier versions of this program have no digests.
    """

    progress: Progress
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    def as_text(self) -> str:
        """Return the text of the file, which holds a digest of itself."""
        about = {"format": STATE_FORMAT, "digest": _NO_DIGEST, "bytes": self.sizes, "digests": self.digests}
        setting = vars(self.progress.setting) | {"images": dict(self.progress.setting.images)}
        text = json.dumps(about | vars(self.progress) | {"setting": setting}, indent=1)
        return text.replace(_NO_DIGEST, digest([text.encode()]).hex(), 1)


def read_progress(folder: Path) -> Progress:
    """Return where the run of a state was. Raise `UserError` if the folder is not a complete state."""
    return read_record(folder).progress


def read_record(folder: Path) -> StateRecord:
    """Return what the progress file of a state says. Raise `UserError` if the folder is not a complete state."""
    try:
        data = (folder / PROGRESS_FILE).read_bytes()
        content = json.loads(data)
        if content.pop("format") not in (STATE_FORMAT, FORMAT_WITHOUT_DIGESTS):
            raise ValueError("it is of another version of this program")
        content.pop("written", None)  # when, by the clock; states of earlier versions
        own_digest = content.pop("digest", None)
        sizes, digests = content.pop("bytes"), content.pop("digests", {})
        _require_sizes(folder, sizes)
        if content.setdefault("noise_by", BY_STEP) not in (BY_IMAGE, BY_STEP):
            raise ValueError(f"its noise is drawn by {content['noise_by']}, which this version does not know")
        progress = Progress(**{**content, "setting": Setting(**content["setting"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{folder}' is not a complete state of this program ({error}).",
            "Use a folder written by --save_state; states of other trainers cannot be resumed.",
        ) from error
    if own_digest is not None:
        zeroed = data.replace(str(own_digest).encode(), _NO_DIGEST.encode(), 1)
        if own_digest != digest([zeroed]).hex():
            raise DamagedState(folder, f"{PROGRESS_FILE} is not as it was written")
    return StateRecord(progress, sizes, digests)


def find_state(resume: str, output_dir: Path, output_name: str | None, damaged: Collection[Path] = ()) -> Path:
    """Return the state that `--resume` names: a folder, or for "latest" the newest complete one of `output_name`.

    Raise `UserError` if there is none. Damaged states in `output_dir` are named and skipped; those in `damaged` have
    been named.
    """
    if resume != LATEST:
        if not Path(resume).is_dir():
            raise UserError(f"--resume: there is no folder '{resume}'.", "Name a state, or 'latest'.")
        return Path(resume)
    states, problems = _states_of(output_dir, output_name, besides=damaged)
    for problem in problems:
        log.warning("%s It is skipped.", problem)
    if states:
        return _newest(states)
    if damaged:
        names = [f"'{folder}'" for folder in damaged]
        raise UserError(
            f"--resume latest: every state of this run is damaged: {listed(names)}.",
            "Restore one of them from a copy, or train from the beginning without --resume.",
        )
    raise UserError(
        f"--resume latest: '{output_dir}' holds no complete state of a run with the same --output_name.",
        "Train with --save_state first, or name the folder of a state.",
    )


def newest_state(output_dir: Path, output_name: str | None) -> Path | None:
    """Return the newest complete state of `output_name` in `output_dir`, None if there is none."""
    states, _ = _states_of(output_dir, output_name)
    return _newest(states) if states else None


def _newest(states: Mapping[Path, Progress]) -> Path:
    # States of earlier versions are not counted: of one run the later step is newer, of two the run begun later.
    return max(states, key=lambda folder: (states[folder].num_states, states[folder].started, states[folder].step))


def num_states(output_dir: Path, output_name: str | None) -> int:
    """Return how many states of `output_name` were written into `output_dir`, as the newest of them has counted."""
    states, _ = _states_of(output_dir, output_name)
    return max((progress.num_states for progress in states.values()), default=0)


def _states_of(
    output_dir: Path, output_name: str | None, besides: Collection[Path] = ()
) -> tuple[dict[Path, Progress], list[str]]:
    """Return the complete states of `output_name` in `output_dir`, and what is wrong with incomplete ones."""
    found, problems = {}, []
    for folder in sorted(output_dir.glob(f"*{STATE_SUFFIX}")):
        if folder in besides:
            continue
        try:
            progress = read_progress(folder)
        except UserError as error:
            problems.append(error.problem)
            continue
        if progress.setting.options.get("output_name", str(output_name)) == str(output_name):
            found[folder] = progress
    return found, problems


def is_state(path: Path) -> bool:
    """Return whether `path` is the folder of a state, complete or not, or the file of its weights."""
    folder = path.parent if path.name == WEIGHTS_FILE else path
    try:
        return (folder / PROGRESS_FILE).is_file()
    except OSError:  # no file system takes that for a name
        return False


def _require_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name} is cut short")
