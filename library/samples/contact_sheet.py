"""The samples of a run in one table, as an image or a page: a row for each prompt, a column for each step."""

import html
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from PIL import Image

from library.config.errors import UserError
from library.config.file_names import TIME_FORMAT
from library.samples.picture_files import PictureName
from library.samples.picture_table import draw_table

log = logging.getLogger(__name__)

_UNREADABLE = (OSError, SyntaxError, ValueError)
"""What Pillow raises for a damaged PNG."""
_AVERAGE = "_ema"
"""Ends the name of an image drawn with the moving average of the weights."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Prompt:
    """What the images of one row share: the model (its output name), a prompt, and the seed if it is fixed.

    `is_average`: they are drawn with the moving average of the weights.
    """

    model: str
    index: int
    prompt_l: str
    prompt_g: str
    negative_l: str
    negative_g: str
    seed: int | None
    is_average: bool = False

    @property
    def details(self) -> str:
        """Number, seed and negative prompts: what tells rows with equal prompts apart."""
        negatives = dict.fromkeys(text for text in (self.negative_l, self.negative_g) if text)
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([f"{self.index:02d}", *seed, *(f"without {text}" for text in negatives)])


EVER = datetime.min, datetime.max
Samples = dict[Prompt, dict[int, Path]]
"""The image files by prompt and training step."""


def texts_of(path: Path) -> Mapping[str, str] | None:
    """Return the texts in an image file, without decoding its pixels; None, after a warning, if it cannot be read."""
    return _read(path, lambda image: {str(name): str(text) for name, text in image.info.items()})


def find_samples(
    folder: Path,
    model: str | None = None,
    span: tuple[datetime, datetime] = EVER,
    texts_of: Callable[[Path], Mapping[str, str] | None] = texts_of,
) -> Samples:
    """Return the sample images of a folder by prompt and training step, without grids.

    `model` (an output name) and `span` (from, before) choose those of one run. If a run was repeated under the same
    name, its images replace the earlier ones: going back from the newest image of a prompt, images are taken as long as
    their steps fall. `texts_of` reads the texts of a file. Raise `UserError` if there are no samples.
    """
    drawn: dict[Prompt, list[tuple[str, int, Path]]] = defaultdict(list)
    since, until = (f"{moment:{TIME_FORMAT}}" for moment in span)
    for name, path in _sample_files(folder):
        if not since <= name.time < until:
            continue
        texts = texts_of(path)
        if texts is not None and "training_step" in texts and model in (None, texts["model"]):
            prompt = Prompt(
                texts["model"],
                name.index,
                texts["prompt_l"],
                texts["prompt_g"],
                texts["negative_prompt_l"],
                texts["negative_prompt_g"],
                name.seed,
                is_average=path.stem.endswith(_AVERAGE),
            )
            drawn[prompt].append((name.time, int(texts["training_step"]), path))
    if not drawn:
        raise UserError(
            f"'{folder}' contains no sample image of sdxl_train.py.", "Pass the folder 'sample' of an output folder."
        )
    prompts = sorted(drawn, key=lambda prompt: (prompt.model, prompt.index, prompt.is_average, min(drawn[prompt])))
    return {prompt: _of_newest_run(drawn[prompt]) for prompt in prompts}


def contact_sheet(samples: Samples, side: int | None = None) -> Image.Image:
    """Return the table of the images; those larger than `side` pixels are reduced. Unreadable files are named."""
    steps = steps_of(samples)
    images = [
        [_read(paths[step], lambda image: _reduced(image, side)) if step in paths else None for step in steps]
        for paths in samples.values()
    ]
    return draw_table(row_labels(list(samples)), [f"step {step}" for step in steps], images)


def contact_page(samples: Samples, folder: Path) -> str:
    """Return the table as an HTML page that lies in `folder` and shows the image files from where they are."""
    steps = steps_of(samples)
    head = "".join(f"<th>step {step}</th>" for step in steps)
    rows = "".join(
        f"<tr><th>{html.escape(label)}</th>{''.join(_cell(paths.get(step), folder) for step in steps)}</tr>\n"
        for label, paths in zip(row_labels(list(samples)), samples.values(), strict=True)
    )
    return _PAGE.format(head=head, rows=rows)


def last_steps(samples: Samples, num_columns: int) -> Samples:
    """Return the samples of at most `num_columns` steps, evenly chosen, the first and the last among them."""
    steps = steps_of(samples)
    last = max(1, num_columns - 1)
    chosen = {steps[round(number * (len(steps) - 1) / last)] for number in range(last + 1)}
    chosen = chosen if num_columns > 1 else {steps[-1]}
    return {prompt: {step: path for step, path in paths.items() if step in chosen} for prompt, paths in samples.items()}


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>contact sheet</title>
<style>
body {{ font: 14px sans-serif; margin: 0; background: #fff; color: #222 }}
th {{ text-align: left; vertical-align: top; font-weight: normal; background: #fff; padding: 6px }}
thead th {{ position: sticky; top: 0; z-index: 1 }}
tbody th {{ position: sticky; left: 0; white-space: pre-wrap; min-width: 14em; max-width: 22em }}
img {{ display: block; width: 256px; height: auto }}
</style>
<table><thead><tr><th></th>{head}</tr></thead><tbody>
{rows}</tbody></table></html>
"""


def _cell(path: Path | None, folder: Path) -> str:
    if path is None:
        return "<td></td>"
    try:
        relative = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        relative = path.resolve().as_uri()
    address = html.escape(relative if "://" in relative else quote(relative))
    return f'<td><a href="{address}"><img src="{address}" loading="lazy" alt=""></a></td>'


def steps_of(samples: Samples) -> list[int]:
    """Return the steps at which any of the samples was drawn, in order."""
    return sorted({step for paths in samples.values() for step in paths})


def _reduced(image: Image.Image, side: int | None) -> Image.Image:
    copy = image.convert("RGB")
    if side is not None:
        copy.thumbnail((side, side))
    return copy


def _sample_files(folder: Path) -> Iterator[tuple[PictureName, Path]]:
    for path in sorted(folder.glob("*.png")):
        name = PictureName.of(path)
        if name is not None and path.is_file():
            yield name, path


def _read(path: Path, what: Callable[[Image.Image], Part]) -> Part | None:
    """Return `what` of an image, or None, after a warning, if the file cannot be read."""
    try:
        with Image.open(path) as image:
            return what(image)
    except _UNREADABLE as error:
        log.warning("'%s' cannot be read and is left out: %s", path, error)
        return None


def _of_newest_run(drawn: Sequence[tuple[str, int, Path]]) -> dict[int, Path]:
    """Return the path for each step, from (time, step, path) of each image."""
    newest: dict[int, Path] = {}
    for _, step, path in sorted(drawn, reverse=True):
        if not newest or step < min(newest):
            newest[step] = path
    return newest


def row_labels(prompts: Sequence[Prompt]) -> list[str]:
    """Return a label for each row: its prompts, and model and details only where they tell rows apart."""
    several_models = len({prompt.model for prompt in prompts}) > 1
    heads = [f"{prompt.model}\n" if several_models else "" for prompt in prompts]
    labels = [
        f"{head}{'EMA' if prompt.is_average else ''}\nL: {prompt.prompt_l}\nG: {prompt.prompt_g}".lstrip("\n")
        for head, prompt in zip(heads, prompts, strict=True)
    ]
    times = Counter(labels)
    return [
        label if times[label] == 1 else f"{prompt.details}\n{label}"
        for prompt, label in zip(prompts, labels, strict=True)
    ]
