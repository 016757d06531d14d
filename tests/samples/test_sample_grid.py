"""The grid of L prompts and G prompts: which cells it has, and where they lie."""

import pytest
from PIL import Image

from library.config.errors import UserError
from library.samples.prompts import SamplePrompt
from library.samples.sample_grid import MAX_CELLS, make_sample_grid

PROMPTS = [
    SamplePrompt("a cat", "photo", negative_g="blurry", seed=7, num_inference_steps=5, width=64),
    SamplePrompt("a dog", "anime", seed=8),
    SamplePrompt("a cat", "anime"),
    SamplePrompt("a fish", "a fish", shared=True),
]
COLOURS = {"photo": 100, "anime": 200, "a cat": 10, "a dog": 20, "a fish": 30}


def test_each_distinct_l_prompt_is_a_row_and_each_distinct_g_prompt_a_column():
    grid = make_sample_grid(PROMPTS)
    assert grid.rows == ("photo", "anime")  # a text that both encoders share is no style
    assert grid.columns == ("a cat", "a dog", "a fish")


def test_cells_differ_in_nothing_but_their_two_prompts():
    cell = make_sample_grid(PROMPTS).prompts()[5]  # second row, third column
    assert (cell.prompt_l, cell.prompt_g) == ("anime", "a fish")
    assert (cell.negative_g, cell.seed, cell.num_inference_steps, cell.width) == ("blurry", 7, 5, 64)


def test_a_long_prompt_pads_every_cell_alike():
    assert make_sample_grid(PROMPTS).num_chunks == 1
    assert make_sample_grid([*PROMPTS, SamplePrompt("a cat", "photo " * 80)]).num_chunks == 2


def test_every_image_lies_in_the_row_of_its_l_prompt_and_the_column_of_its_g_prompt():
    def draw_cell(prompt: SamplePrompt) -> Image.Image | None:
        if prompt.prompt_g == "a dog" and prompt.prompt_l == "photo":
            return None  # one that could not be drawn leaves its place empty
        return Image.new("RGB", (40, 30), (255, COLOURS[prompt.prompt_l], COLOURS[prompt.prompt_g]))

    grid = make_sample_grid(PROMPTS)
    table = grid.table([draw_cell(prompt) for prompt in grid.prompts()])
    shown = [colour for _, colour in table.getcolors(table.width * table.height) if colour[0] == 255]
    cells = {(row, column) for _, row, column in shown if row in (100, 200) and column in (10, 20, 30)}
    assert cells == {(100, 10), (100, 30), (200, 10), (200, 20), (200, 30)}
    places = {
        (row, column): next(
            (x, y)
            for y in range(table.height)
            for x in range(table.width)
            if table.getpixel((x, y)) == (255, row, column)
        )
        for row, column in cells
    }
    assert places[100, 10][1] == places[100, 30][1] < places[200, 10][1] == places[200, 20][1]
    assert places[100, 10][0] == places[200, 10][0] < places[200, 20][0] < places[200, 30][0] == places[100, 30][0]


def test_too_many_cells_are_refused_with_their_number():
    prompts = [SamplePrompt(f"g {number}", f"l {number}") for number in range(9)]
    with pytest.raises(UserError, match=f"9 L prompts with 9 G prompts are 81 images; the limit is {MAX_CELLS}"):
        make_sample_grid(prompts)


def test_a_file_without_any_l_prompt_makes_no_grid():
    with pytest.raises(UserError, match="no line of the prompt file has an L prompt"):
        make_sample_grid([SamplePrompt("a cat", "a cat", shared=True)])
