"""The contact sheet: every prompt a row, every step a column, from the samples of any run."""

import os
import re
from urllib.parse import unquote

import pytest
from PIL import Image

from finetune.contact_sheet import main
from library.config.errors import UserError
from library.samples.contact_sheet import contact_page, contact_sheet, find_samples, last_steps
from library.samples.picture_files import PictureRecord, save_picture
from library.samples.prompts import SamplePrompt

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
    sheet = contact_sheet(find_samples(tmp_path))
    pixels = [(x, y, sheet.getpixel((x, y))) for y in range(sheet.height) for x in range(sheet.width)]
    corners = {}
    for x, y, (red, green, blue) in pixels:
        if red - 10 in range(len(STYLES)) and green - 20 in range(len(STEPS)) and blue == 99:  # not of a letter's edge
            corners.setdefault((red - 10, green - 20), (x, y))
    assert len(corners) == len(STYLES) * len(STEPS)
    assert all(corners[0, column][1] < corners[1, column][1] for column in range(3))
    assert all(corners[row, 0][0] < corners[row, 1][0] < corners[row, 2][0] for row in range(2))


def draw(folder, prompt, *, step, time, index=0, model="m"):
    """An empty sample picture, as `sdxl_train.py` would name it."""
    record = PictureRecord(prompt, "ddim", 40, 30, seed=prompt.seed or step, step=step, model_name=model)
    seed = "" if prompt.seed is None else f"_{prompt.seed}"
    path = folder / f"{model}_202601011200{time:02d}_{step:06d}_{index:02d}{seed}.png"
    save_picture(path, Image.new("RGB", (40, 30)), record)
    return path


def test_prompts_that_differ_in_seed_or_negative_or_place_have_rows_of_their_own(tmp_path):
    prompts = [
        SamplePrompt("a cat", "photo", seed=1),
        SamplePrompt("a cat", "photo", seed=2),
        SamplePrompt("a cat", "photo", negative_g="ugly"),
        SamplePrompt("a cat", "photo"),
    ]
    paths = [draw(tmp_path, prompt, step=5, time=index, index=index) for index, prompt in enumerate(prompts)]
    assert list(find_samples(tmp_path).values()) == [{5: path} for path in paths]


def test_models_of_one_folder_have_rows_of_their_own(tmp_path):
    first = draw(tmp_path, SamplePrompt("a cat", "photo"), step=1, time=1, model="one")
    other = draw(tmp_path, SamplePrompt("a cat", "photo"), step=2, time=2, model="other")
    assert list(find_samples(tmp_path).values()) == [{1: first}, {2: other}]


def test_a_repeated_run_takes_the_place_of_the_one_before_whatever_the_files_own_times_say(tmp_path):
    prompt = SamplePrompt("a cat", "photo")
    before = [draw(tmp_path, prompt, step=step, time=step) for step in (0, 5, 10)]
    now = [draw(tmp_path, prompt, step=step, time=20 + step) for step in (0, 4)]
    for path in before:
        os.utime(path, (2e9, 2e9))  # as if they had been copied last
    assert list(find_samples(tmp_path).values()) == [{0: now[0], 4: now[1]}]


def test_a_file_that_is_no_whole_picture_is_named_and_the_others_are_shown(tmp_path, capsys):
    write_samples(tmp_path)
    whole = contact_sheet(find_samples(tmp_path)).size
    cut, empty = sorted(tmp_path.glob("*_00.png"))[:2]
    cut.write_bytes(cut.read_bytes()[:-40])
    empty.write_bytes(b"")
    (tmp_path / "m_20260101120009_000000_00.png").mkdir()
    (tmp_path / "notes.png").write_text("no picture")
    assert main([str(tmp_path), f"--output={tmp_path / 'new folder' / 'sheet.png'}"]) == 0
    said = capsys.readouterr().err
    assert f"'{cut}' cannot be read and is left out" in said
    assert f"'{empty}' cannot be read and is left out" in said
    assert "notes" not in said
    with Image.open(tmp_path / "new folder" / "sheet.png") as sheet:
        assert sheet.size == whole


def test_a_folder_without_samples_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="contains no sample image"):
        find_samples(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main([str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_page_and_image_lie_beside_the_samples_and_the_page_shows_each_file(tmp_path):
    folder = tmp_path / "my output" / "sample #1"
    folder.mkdir(parents=True)
    write_samples(folder)
    assert main([str(folder)]) == 0
    page = (folder.parent / "contact_sheet.html").read_text(encoding="utf-8")
    shown = [unquote(source) for source in re.findall(r'<img src="([^"]+)"', page)]
    assert {(folder.parent / source).resolve() for source in shown} == {path.resolve() for path in folder.iterdir()}
    assert [int(step) for step in re.findall(r"<th>step (\d+)</th>", page)] == list(STEPS)
    with Image.open(folder.parent / "contact_sheet.png") as sheet:
        assert sheet.size == contact_sheet(find_samples(folder)).size


def test_what_prompts_say_is_text_of_the_page(tmp_path):
    draw(tmp_path, SamplePrompt("<script>alert(1)</script>", "a & b"), step=1, time=1)
    page = contact_page(find_samples(tmp_path), tmp_path)
    assert "<script>" not in page
    assert "L: a &amp; b\nG: &lt;script&gt;" in page


def test_large_images_are_reduced_in_the_image(tmp_path):
    write_samples(tmp_path)
    assert contact_sheet(find_samples(tmp_path), 20).width < contact_sheet(find_samples(tmp_path)).width


def test_few_columns_are_chosen_evenly(tmp_path):
    prompt = SamplePrompt("a cat", "photo")
    for step in range(0, 50, 10):
        draw(tmp_path, prompt, step=step, time=step)
    samples = find_samples(tmp_path)
    chosen = {number: sorted(*last_steps(samples, number).values()) for number in (1, 2, 3, 9)}
    assert chosen == {1: [40], 2: [0, 40], 3: [0, 20, 40], 9: [0, 10, 20, 30, 40]}
