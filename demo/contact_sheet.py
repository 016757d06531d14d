"""Arrange the sample images of a run in one image: a row for each prompt, a column for each step.

python demo/contact_sheet.py "my set/output/sample" "my set/contact_sheet.png"      of any run of sdxl_train.py
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from PIL import Image

from library.config.atomic_files import replacing
from library.config.errors import UserError, exits_on_user_error
from library.samples.picture_files import PictureName
from library.samples.picture_table import draw_table

_UNREADABLE = (OSError, SyntaxError, ValueError)
"""What Pillow raises for a damaged PNG."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Prompt:
    """What the images of one row share: the model (its output name), a prompt, and the seed if it is fixed."""

    model: str
    index: int
    prompt_l: str
    prompt_g: str
    negative_l: str
    negative_g: str
    seed: int | None

    @property
    def details(self) -> str:
        """Number, seed and negative prompts: what tells rows with equal prompts apart."""
        negatives = dict.fromkeys(text for text in (self.negative_l, self.negative_g) if text)
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([f"{self.index:02d}", *seed, *(f"without {text}" for text in negatives)])


def find_samples(folder: Path) -> dict[Prompt, dict[int, Path]]:
    """Return the sample images of a folder by prompt and training step, without grids.

    If a run was repeated under the same name, its images replace the earlier ones: going back from the newest image of
    a prompt, images are taken as long as their steps fall. Raise `UserError` if there are no samples.
    """
    drawn: dict[Prompt, list[tuple[str, int, Path]]] = defaultdict(list)
    for name, path in _sample_files(folder):
        texts = _read(path, lambda image: image.info)  # does not decode the pixels
        if texts is not None and "training_step" in texts:
            prompt = Prompt(
                texts["model"],
                name.index,
                texts["prompt_l"],
                texts["prompt_g"],
                texts["negative_prompt_l"],
                texts["negative_prompt_g"],
                name.seed,
            )
            drawn[prompt].append((name.time, int(texts["training_step"]), path))
    if not drawn:
        raise UserError(
            f"'{folder}' contains no sample image of sdxl_train.py.", "Pass the folder 'sample' of an output folder."
        )
    prompts = sorted(drawn, key=lambda prompt: (prompt.model, prompt.index, min(drawn[prompt])))
    return {prompt: _of_newest_run(drawn[prompt]) for prompt in prompts}


def contact_sheet(folder: Path) -> Image.Image:
    """Return the table of all sample images of a folder; raise as `find_samples`. Unreadable files are named."""
    samples = find_samples(folder)
    steps = sorted({step for paths in samples.values() for step in paths})
    images = [
        [_read(paths[step], Image.Image.copy) if step in paths else None for step in steps]
        for paths in samples.values()
    ]
    return draw_table(_labels(list(samples)), [f"step {step}" for step in steps], images)


def _sample_files(folder: Path) -> Iterator[tuple[PictureName, Path]]:
    for path in sorted(folder.glob("*.png")):
        name = PictureName.of(path)
        if name is not None and path.is_file():
            yield name, path


def _read(path: Path, what: Callable[[Image.Image], Part]) -> Part | None:
    """Return `what` of an image, or None, with a message, if the file cannot be read."""
    try:
        with Image.open(path) as image:
            return what(image)
    except _UNREADABLE as error:
        print(f"skipping '{path}', which cannot be read: {error}", file=sys.stderr)
        return None


def _of_newest_run(drawn: Sequence[tuple[str, int, Path]]) -> dict[int, Path]:
    """Return the path for each step, from (time, step, path) of each image."""
    newest: dict[int, Path] = {}
    for _, step, path in sorted(drawn, reverse=True):
        if not newest or step < min(newest):
            newest[step] = path
    return newest


def _labels(prompts: Sequence[Prompt]) -> list[str]:
    """Return a label for each row: its prompts, and model and details only where they tell rows apart."""
    several_models = len({prompt.model for prompt in prompts}) > 1
    heads = [f"{prompt.model}\n" if several_models else "" for prompt in prompts]
    labels = [f"{head}L: {prompt.prompt_l}\nG: {prompt.prompt_g}" for head, prompt in zip(heads, prompts, strict=True)]
    times = Counter(labels)
    return [
        label if times[label] == 1 else f"{prompt.details}\n{label}"
        for prompt, label in zip(prompts, labels, strict=True)
    ]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Write the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder of the sample images")
    parser.add_argument("path", type=Path, help=".png file to write")
    arguments = parser.parse_args(argv)
    if arguments.path.suffix.lower() != ".png":
        parser.error(f"'{arguments.path}' must end in .png")
    sheet = contact_sheet(arguments.samples)
    with replacing(arguments.path) as file:
        sheet.save(file, format="PNG")
    print(f"contact sheet: {arguments.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
