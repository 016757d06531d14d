"""What a run says when it is over: time, steps, images, losses, files, and what to do next."""

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from library.config.errors import listed
from library.config.options import is_secret
from library.training.progress import STATE_SUFFIX
from library.training.tracking import RunFigures

CONTACT_SHEET = "finetune/contact_sheet.py"
_NAMES_OF_PLACES = frozenset({"pretrained_model_name_or_path", "vae", "resume", "metadata_thumbnail"})


def summary(
    figures: RunFigures, *, step: int, num_images: int, written: Sequence[Path], samples: Path, is_finished: bool
) -> str:
    """Return the summary, one fact a line; `written` are the models and states of the run that are still there."""
    lines = [_what_was_done(figures, step, num_images)]
    if not math.isnan(figures.loss):
        lines.append(f"last loss {figures.loss:.4f}, average {figures.average:.4f}")
    if written:
        names = [f"'{path}'" for path in written]
        lines.append(f"wrote {listed(names)}")
    if is_finished:
        lines += _what_next(written, samples)
    return "\n  ".join(lines)


def logged_options(groups: Any) -> dict[str, Any]:
    """Return the options as trackers take them, by name: without secrets, and without the folders of the machine."""
    return {
        name: value if isinstance(value, int | float) else str(value)
        for group in vars(groups).values()
        for name, value in _shown(group)
    }


def _shown(group: Any) -> list[tuple[str, Any]]:
    fields = [each for each in group.__dataclass_fields__.values() if each.metadata and not is_secret(each)]
    values = [(each.name, getattr(group, each.name)) for each in fields]
    return [
        (name, Path(value).name if name in _NAMES_OF_PLACES and value is not None else value)
        for name, value in values
        if not isinstance(value, Path)
    ]


def _what_was_done(figures: RunFigures, step: int, num_images: int) -> str:
    num_steps, seen = step - figures.steps_before, num_images - figures.num_images_before
    whole = timedelta(seconds=round(time.perf_counter() - figures.started))
    before = f" (after {figures.steps_before} before)" if figures.steps_before else ""
    speed = f", {seen / figures.seconds:.3g} images a second" if seen and figures.seconds else ""
    return f"{num_steps} steps{before} in {whole}: {seen} images seen{speed}"


def _what_next(written: Sequence[Path], samples: Path) -> list[str]:
    lines = []
    if any(path.suffix for path in written):
        lines.append("next: open the model in ComfyUI or a WebUI (docs/captions-and-prompts.md)")
    elif written:
        lines.append("next: load the model with diffusers (docs/captions-and-prompts.md)")
    if samples.is_dir():
        lines.append(f'its samples on a page: python {CONTACT_SHEET} "{samples}"')
    if any(path.name.endswith(STATE_SUFFIX) for path in written):
        lines.append("to train longer: the same command with --resume latest and a larger --max_train_steps")
    return lines
