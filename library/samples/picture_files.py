"""Sample pictures on the disk: their names, and what their PNGs say of how they were drawn."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Self

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.config.atomic_files import replacing
from library.samples.prompts import SamplePrompt

_TIME_FORMAT = "%Y%m%d%H%M%S"
_TIME_DIGITS = 14
_NAME = re.compile(
    r"(?:.*_)?(?P<time>[0-9]{14})_e?[0-9]{6,}_(?:(?P<index>[0-9]{2,})(?:_(?P<seed>[0-9]+))?|grid)\.png", re.DOTALL
)


@dataclass(frozen=True)
class PictureRecord:
    """How one picture was drawn; `step` counts optimizer steps, `model_name` is the output name of the run."""

    prompt: SamplePrompt
    sampler: str
    width: int
    height: int
    seed: int
    step: int
    model_name: str


def picture_name(
    model_name: str | None, *, now: datetime, step: int, epoch: int | None, index: int, seed: int | None
) -> str:
    """The reference's file name: model, time, step (or epoch, where samples are made by epoch), index, fixed seed."""
    prefix = "" if model_name is None else f"{model_name}_"
    when = f"e{epoch:06d}" if epoch is not None else f"{step:06d}"
    suffix = "" if seed is None else f"_{seed}"
    return f"{prefix}{now:{_TIME_FORMAT}}_{when}_{index:02d}{suffix}.png"


def grid_name(model_name: str | None, *, now: datetime, step: int) -> str:
    """Return the file name of the grid of `--sample_grid`: as `picture_name`, with "grid" for the index."""
    return picture_name(model_name, now=now, step=step, epoch=None, index=0, seed=None).replace("_00.png", "_grid.png")


@dataclass(frozen=True)
class PictureName:
    """What the file name of a sample picture says: its time (14 digits), the place of its prompt, its fixed seed."""

    time: str
    index: int
    seed: int | None

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Of a name as `picture_name` makes it; None for every other, those of grids among them."""
        match = _NAME.fullmatch(path.name)
        if match is None or match["index"] is None:
            return None
        return cls(match["time"], int(match["index"]), None if match["seed"] is None else int(match["seed"]))


def other_drawings(path: Path, since: datetime) -> list[Path]:
    """Return the files of the same picture as `path` that were drawn at another time, but not before `since`.

    A run that was killed after it had drawn them, and goes on from a state of before, draws them again.
    """
    match = _NAME.fullmatch(path.name)
    assert match is not None  # as `picture_name` makes it
    start, end = path.name[: match.start("time")], path.name[match.end("time") :]
    same_picture = path.parent.glob(f"{escape(start)}{'[0-9]' * _TIME_DIGITS}{escape(end)}")
    earliest = f"{start}{since:{_TIME_FORMAT}}"
    return [other for other in same_picture if other.name != path.name and other.name >= earliest]


def parameters_text(record: PictureRecord) -> str:
    """Return what WebUIs show of a picture: G prompt, negative prompt, then settings, the L prompts among them."""
    prompt = record.prompt
    settings = {
        "Steps": prompt.num_inference_steps,
        "Sampler": record.sampler,
        "CFG scale": prompt.guidance_scale,
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": _quoted(record.model_name),
        "Training step": record.step,
        "Prompt L": _quoted(prompt.prompt_l),
    }
    if prompt.negative_l != prompt.negative_g:
        settings["Negative prompt L"] = _quoted(prompt.negative_l)
    lines = [prompt.prompt_g]
    if prompt.negative_g:
        lines.append(f"Negative prompt: {prompt.negative_g}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def save_picture(
    path: Path, image: Image.Image, record: PictureRecord, more_texts: Mapping[str, str] | None = None
) -> None:
    """Write the PNG, whole or not at all, with `parameters_text` and each setting under a separate name."""
    prompt = record.prompt
    entries = {
        "parameters": parameters_text(record),
        "prompt_g": prompt.prompt_g,
        "prompt_l": prompt.prompt_l,
        "negative_prompt_g": prompt.negative_g,
        "negative_prompt_l": prompt.negative_l,
        "seed": str(record.seed),
        "steps": str(prompt.num_inference_steps),
        "guidance_scale": str(prompt.guidance_scale),
        "sampler": record.sampler,
        "size": f"{record.width}x{record.height}",
        "training_step": str(record.step),
        "model": record.model_name,
        **(more_texts or {}),
    }
    info = PngInfo()
    for name, value in entries.items():
        info.add_itxt(name, value)  # international text: prompts are of any script
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def _quoted(text: str) -> str:
    """Text that may hold commas, colons and line ends, as WebUIs quote it in the line of settings."""
    return json.dumps(text, ensure_ascii=False)
