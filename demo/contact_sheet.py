"""The sample pictures of a run as one picture: a row for each prompt, a column for each step.

python demo/contact_sheet.py "my set/output/sample" "my set/contact_sheet.png"      of any run of sdxl_train.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from PIL import Image

from library.config.errors import UserError, exits_on_user_error
from library.diffusion.picture_table import draw_table

Prompt = tuple[str, str]
"""The L and the G prompt of a picture."""


def read_samples(folder: Path) -> dict[tuple[Prompt, int], Image.Image]:
    """The sample pictures of a folder by prompt and training step, each the newest of its kind; grids are left out.

    What they show is read from their PNG texts. Raises `UserError` where there are none.
    """
    samples: dict[tuple[Prompt, int], Image.Image] = {}
    for path in sorted(folder.glob("*.png"), key=lambda path: (path.stat().st_mtime, path.name)):
        with Image.open(path) as picture:
            picture.load()
        texts = picture.info
        if "training_step" in texts and "rows_prompt_l" not in texts:
            samples[(texts["prompt_l"], texts["prompt_g"]), int(texts["training_step"])] = picture
    if not samples:
        raise UserError(
            f"'{folder}' holds no sample picture of sdxl_train.py.", "Give the folder 'sample' of an output folder."
        )
    return samples


def contact_sheet(folder: Path) -> Image.Image:
    """The table of all sample pictures of a folder; raises as `read_samples`."""
    samples = read_samples(folder)
    prompts = list(dict.fromkeys(prompt for prompt, _ in samples))
    steps = sorted({step for _, step in samples})
    rows = [f"L: {prompt_l} G: {prompt_g}" for prompt_l, prompt_g in prompts]
    columns = [f"step {step}" for step in steps]
    return draw_table(rows, columns, [[samples.get((prompt, step)) for step in steps] for prompt in prompts])


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="the folder of the sample pictures")
    parser.add_argument("path", type=Path, help="the .png to write")
    arguments = parser.parse_args(argv)
    contact_sheet(arguments.samples).save(arguments.path)
    print(f"contact sheet: {arguments.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
