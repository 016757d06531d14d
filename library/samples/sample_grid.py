"""Every L prompt with every G prompt: a table of images that shows what each encoder decides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from library.config.errors import UserError
from library.samples.picture_table import draw_table
from library.samples.prompts import SamplePrompt
from library.sdxl.tokenizers import num_chunks_needed

MAX_CELLS = 64
"""A larger grid is taken for a mistake: each cell takes as long as a sample image."""


@dataclass(frozen=True)
class SampleGrid:
    """The prompts of a grid: a row for each L prompt, a column for each G prompt.

    Every cell has the negative prompt, size, seed, guidance scale, number of steps and sampler of `first`, the first
    prompt of the file, so that two cells differ in nothing but their two prompts.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    first: SamplePrompt

    @property
    def num_chunks(self) -> int:
        """Chunks of 75 tokens for every cell: a long prompt must not pad only the prompts of its row."""
        texts = (*self.rows, *self.columns, self.first.negative_l, self.first.negative_g)
        return max(num_chunks_needed(text) for text in texts)

    def prompts(self) -> list[SamplePrompt]:
        """Return the prompt of each cell, row by row."""
        return [
            replace(self.first, prompt_l=prompt_l, prompt_g=prompt_g, shared=False)
            for prompt_l in self.rows
            for prompt_g in self.columns
        ]

    def table(self, images: Sequence[Image.Image | None]) -> Image.Image:
        """Return the labelled table of the images of `prompts()`; None leaves a cell grey."""
        width = len(self.columns)
        cells = [images[start : start + width] for start in range(0, len(images), width)]
        return draw_table([f"L: {text}" for text in self.rows], [f"G: {text}" for text in self.columns], cells)

    def texts(self) -> dict[str, str]:
        """Return the PNG texts that hold the prompts of rows and columns, each a JSON list."""
        return {
            "rows_prompt_l": json.dumps(self.rows, ensure_ascii=False),
            "columns_prompt_g": json.dumps(self.columns, ensure_ascii=False),
        }


def make_sample_grid(prompts: Sequence[SamplePrompt]) -> SampleGrid:
    """Return the grid of the distinct L prompts and the distinct G prompts, in the order of the file.

    A prompt that both encoders share makes a column, but no row. Raise `UserError` if no prompt has an L text, and for
    more than `MAX_CELLS` cells.
    """
    rows = tuple(dict.fromkeys(prompt.prompt_l for prompt in prompts if not prompt.shared))
    columns = tuple(dict.fromkeys(prompt.prompt_g for prompt in prompts))
    if not rows:
        raise UserError(
            "--sample_grid sets L prompts against G prompts, and no line of the prompt file has an L prompt.",
            "Add --e and a text to some of its lines.",
        )
    if len(rows) * len(columns) > MAX_CELLS:
        raise UserError(
            f"--sample_grid: {len(rows)} L prompts with {len(columns)} G prompts are {len(rows) * len(columns)}"
            f" images; the limit is {MAX_CELLS}.",
            "Use fewer different texts in the prompt file.",
        )
    return SampleGrid(rows, columns, prompts[0])
