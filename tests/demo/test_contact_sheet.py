"""The contact sheet: every prompt a row, every step a column, from the samples of any run."""

import pytest
from PIL import Image

from demo.contact_sheet import contact_sheet, main
from library.config.errors import UserError
from library.diffusion.picture_files import PictureRecord, save_picture
from library.diffusion.prompts import SamplePrompt

STYLES, STEPS = ("photo", "anime"), (0, 10, 200)


def write_samples(folder):
    """A picture for each of two prompts at each of three steps: its red says the prompt, its green the step."""
    for row, style in enumerate(STYLES):
        for column, step in enumerate(STEPS):
            record = PictureRecord(SamplePrompt("a cat", style), "ddim", 40, 30, seed=1, step=step, model_name="m")
            image = Image.new("RGB", (40, 30), (10 + row, 20 + column, 99))
            save_picture(folder / f"m_2026010112000{column}_{step:06d}_{row:02d}.png", image, record)


def test_rows_are_prompts_and_columns_are_steps_in_their_order(tmp_path):
    write_samples(tmp_path)
    grid = Image.new("RGB", (40, 30), (10, 20, 99))
    record = PictureRecord(SamplePrompt("a cat", "photo"), "ddim", 40, 30, seed=1, step=0, model_name="m")
    save_picture(tmp_path / "m_20260101120000_000000_grid.png", grid, record, {"rows_prompt_l": "[]"})
    sheet = contact_sheet(tmp_path)
    pixels = [(x, y, sheet.getpixel((x, y))) for y in range(sheet.height) for x in range(sheet.width)]
    corners = {}
    for x, y, (red, green, blue) in pixels:
        if red - 10 in range(len(STYLES)) and green - 20 in range(len(STEPS)) and blue == 99:  # not of a letter's edge
            corners.setdefault((red - 10, green - 20), (x, y))
    assert len(corners) == len(STYLES) * len(STEPS)
    assert all(corners[0, column][1] < corners[1, column][1] for column in range(3))
    assert all(corners[row, 0][0] < corners[row, 1][0] < corners[row, 2][0] for row in range(2))


def test_a_folder_without_samples_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no sample picture"):
        contact_sheet(tmp_path)
    assert main([str(tmp_path), str(tmp_path / "sheet.png")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
