"""The line of a prompt file that draws a sample again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.config.errors import UserError
from library.samples.contact_sheet import texts_of
from library.samples.picture_files import PictureRecord, save_picture
from library.samples.prompt_lines import prompt_line
from library.samples.prompts import SamplePrompt, parse_prompt_line, read_prompt_file

PROMPT = SamplePrompt("a cat, (red:1.2)", "photo", "ugly", "ugly", guidance_scale=7.5, num_inference_steps=28)


def texts(prompt: SamplePrompt, folder: Path) -> dict[str, str]:
    path = folder / "sample.png"
    save_picture(path, Image.new("RGB", (8, 8)), PictureRecord(prompt, "euler_a", 832, 1216, 2**63, 5, "m"))
    found = texts_of(path)
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        replace(PROMPT, negative_l=""),
        replace(PROMPT, negative_g="", negative_l="grey"),
        replace(PROMPT, prompt_l="", guidance_rescale=0.7, guidance_scale=1e-3),
        replace(PROMPT, prompt_g="ein Käfer, 猫 - and — a dash"),
    ],
)
def test_a_line_draws_the_same_image(prompt: SamplePrompt, tmp_path: Path):
    read = parse_prompt_line(prompt_line(texts(prompt, tmp_path)), "here")
    expected = replace(prompt, width=832, height=1216, seed=2**63, sampler="euler_a")
    assert replace(read, shared=False) == expected


@pytest.mark.parametrize("text", ["a cat --w 5", "first\nsecond", "", "# no comment", "-"])
def test_what_no_line_can_hold_is_an_entry_of_json(text: str, tmp_path: Path):
    prompt = replace(PROMPT, prompt_l=text)
    copied = prompt_line(texts(prompt, tmp_path))
    if copied.startswith("["):
        file = tmp_path / "prompt.json"
        file.write_text(copied, encoding="utf-8")
        [read] = read_prompt_file(file)
    else:
        read = parse_prompt_line(copied, "here")
    assert (read.prompt_l, read.prompt_g, read.seed) == (text, prompt.prompt_g, 2**63)


def test_an_image_that_does_not_say_how_it_was_drawn_is_refused():
    with pytest.raises(UserError, match="does not say how"):
        prompt_line({"prompt_g": "a cat"})
    with pytest.raises(UserError, match="does not say how"):
        prompt_line(json.loads('{"size": "x"}'))
