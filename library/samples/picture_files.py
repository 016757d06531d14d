"""Sample images on disk: file names, and the text in their PNGs that says how they were drawn."""

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
from library.config.file_names import TIME_FORMAT
from library.samples.comfyui_workflow import comfyui_texts
from library.samples.prompts import SamplePrompt
from library.samples.sampler_names import names_of
from library.sdxl.prediction import SDXL_PREDICTION, Prediction

SAMPLE_FOLDER = "sample"
"""The folder of sample images in the output folder of a run."""
_TIME_DIGITS = 14
_PARAMETERS = "parameters"  # the name under which WebUIs look for how an image was made
_NAME = re.compile(
    r"(?:.*_)?(?P<time>[0-9]{14})_e?(?P<count>[0-9]{6,})_"
    r"(?:(?P<index>[0-9]{2,})(?:_(?P<seed>[0-9]+))?|grid)(?P<mark>_ema)?\.png",
    re.DOTALL,
)
_UNQUOTED = re.compile(r'(?!")[^,:\r\n]*')


@dataclass(frozen=True)
class PictureRecord:
    """How an image was drawn, by a model that predicts `prediction`.

    `model_name` is the output name of the run, or that of the model's file, or empty.

    `step` counts optimizer steps; None for an image that no run has drawn.
    """

    prompt: SamplePrompt
    sampler: str
    width: int
    height: int
    seed: int
    step: int | None
    model_name: str
    prediction: Prediction = SDXL_PREDICTION


def picture_name(
    model_name: str | None,
    *,
    now: datetime,
    step: int,
    epoch: int | None,
    index: int,
    seed: int | None,
    mark: str = "",
) -> str:
    """Return kohya's file name: model, time, step (or epoch, if samples are drawn by epoch), index, fixed seed.

    `mark` is "_ema" for an image drawn with the moving average of the weights.
    """
    prefix = "" if model_name is None else f"{model_name}_"
    when = f"e{epoch:06d}" if epoch is not None else f"{step:06d}"
    suffix = "" if seed is None else f"_{seed}"
    return f"{prefix}{now:{TIME_FORMAT}}_{when}_{index:02d}{suffix}{mark}.png"


def grid_name(model_name: str | None, *, now: datetime, step: int, mark: str = "") -> str:
    """Return the file name of the grid of `--sample_grid`: as `picture_name`, with "grid" as the index."""
    name = picture_name(model_name, now=now, step=step, epoch=None, index=0, seed=None)
    return name.removesuffix("_00.png") + f"_grid{mark}.png"


@dataclass(frozen=True)
class PictureName:
    """The parts of a sample image's file name: time (14 digits), index of its prompt, fixed seed."""

    time: str
    index: int
    seed: int | None

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Return the parts of a name that `picture_name` made; None for any other, including those of grids."""
        match = _NAME.fullmatch(path.name)
        if match is None or match["index"] is None:
            return None
        return cls(match["time"], int(match["index"]), None if match["seed"] is None else int(match["seed"]))


def other_drawings(path: Path, since: datetime) -> list[Path]:
    """Return the files of the same image as `path` that were drawn at another time, but not before `since`.

    A run that was killed after drawing them draws them again when it resumes from an earlier state.
    """
    match = _NAME.fullmatch(path.name)
    assert match is not None  # as `picture_name` makes it
    start, end = path.name[: match.start("time")], path.name[match.end("time") :]
    same_image = path.parent.glob(f"{escape(start)}{'[0-9]' * _TIME_DIGITS}{escape(end)}")
    earliest = f"{start}{since:{TIME_FORMAT}}"
    return [other for other in same_image if other.name != path.name and other.name >= earliest]


def newest_pictures(folder: Path, model_name: str | None, since: datetime) -> list[Path]:
    """Return the images that a run drew after its first step or later, the newest first, then in the prompts' order.

    `since` is when the run began.
    """
    prefix = "" if model_name is None else f"{model_name}_"
    found = []
    for path in folder.glob(f"{escape(prefix)}{'[0-9]' * _TIME_DIGITS}_*.png"):
        match = _NAME.fullmatch(path.name)
        if match is None or match["index"] is None or match.start("time") != len(prefix) or not int(match["count"]):
            continue
        if match["mark"]:  # the moving average is another model
            continue
        if match["time"] >= f"{since:{TIME_FORMAT}}":
            found.append((-int(match["count"]), int(match["index"]), path))
    return [path for *_, path in sorted(found)]


def find_grids(folder: Path, model_name: str | None, since: datetime, until: datetime) -> dict[int, Path]:
    """Return the grids that a run drew in a span of time, by step; of several of a step the newest."""
    prefix = "" if model_name is None else f"{model_name}_"
    span = f"{since:{TIME_FORMAT}}", f"{until:{TIME_FORMAT}}"
    grids = {}
    for path in sorted(folder.glob(f"{escape(prefix)}{'[0-9]' * _TIME_DIGITS}_*_grid.png")):
        match = _NAME.fullmatch(path.name)
        if match is not None and match.start("time") == len(prefix) and span[0] <= match["time"] < span[1]:
            grids[int(match["count"])] = path
    return grids


def parameters_text(record: PictureRecord) -> str:
    """Return what WebUIs show beside an image: G prompt, negative prompt, then settings with the L prompts."""
    prompt = record.prompt
    names = names_of(record.sampler)
    settings = {
        "Steps": prompt.num_inference_steps,
        "Sampler": names.webui,
        "Schedule type": names.webui_schedule,
        "CFG scale": prompt.guidance_scale,
        **({"Guidance rescale": prompt.guidance_rescale} if prompt.guidance_rescale else {}),
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": _quoted(record.model_name),
        **({} if record.step is None else {"Training step": record.step}),
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
    """Write the PNG, whole or not at all.

    Its text holds `parameters_text`, each setting under its own name, and the workflow that ComfyUI opens.
    """
    prompt = record.prompt
    entries = {
        _PARAMETERS: parameters_text(record),
        "prompt_g": prompt.prompt_g,
        "prompt_l": prompt.prompt_l,
        "negative_prompt_g": prompt.negative_g,
        "negative_prompt_l": prompt.negative_l,
        "seed": str(record.seed),
        "steps": str(prompt.num_inference_steps),
        "guidance_scale": str(prompt.guidance_scale),
        **({"guidance_rescale": str(prompt.guidance_rescale)} if prompt.guidance_rescale else {}),
        "sampler": record.sampler,
        "size": f"{record.width}x{record.height}",
        **({} if record.step is None else {"training_step": str(record.step)}),
        "model": record.model_name,
        **(more_texts or {}),
    }
    info = PngInfo()
    for name, value in entries.items():
        info.add_itxt(name, value)  # international text: prompts can be in any script
    for name, value in _workflow_texts(record).items():
        info.add_text(name, value)  # plain text: all that older releases of ComfyUI read
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_picture(path: Path) -> tuple[Image.Image, str]:
    """Return a sample image and its `parameters_text`. Raise `OSError` if the file cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image, str(image.info.get(_PARAMETERS, ""))
    except (SyntaxError, ValueError) as error:  # how Pillow answers some kinds of damage
        raise OSError(str(error)) from error


def _workflow_texts(record: PictureRecord) -> dict[str, str]:
    model_name = record.model_name or "last"  # kohya's name for the model of a run without one
    return comfyui_texts(
        record.prompt,
        sampler=record.sampler,
        width=record.width,
        height=record.height,
        seed=record.seed,
        checkpoint=f"{model_name}.safetensors",
        prediction=record.prediction,
    )


def _quoted(text: str) -> str:
    """Return text for the line of settings, in quotes only where WebUIs would otherwise end or change it."""
    needs_quotes = text != text.strip() or not _UNQUOTED.fullmatch(text)
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text
