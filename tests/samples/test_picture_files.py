"""Sample images on disk: kohya's file names, and text that WebUIs read."""

import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from library.config.errors import UserError
from library.samples.picture_files import (
    PictureName,
    PictureRecord,
    grid_name,
    other_drawings,
    parameters_text,
    picture_name,
    save_picture,
)
from library.samples.prompts import SamplePrompt, read_prompt_file

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompt_lines.json").read_text(encoding="utf-8"))
NOW = datetime(2026, 2, 3, 4, 5, 6)
RECORD = PictureRecord(
    prompt=SamplePrompt("a cat, sofa", "film grain", "ugly", "ugly", guidance_scale=7.0, num_inference_steps=28),
    sampler="euler_a",
    width=832,
    height=1216,
    seed=42,
    step=500,
    model_name="finetuned_model",
)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["lines"], ids=lambda case: case["line"])
def test_the_name_is_the_one_that_the_reference_gives(case: dict, tmp_path: Path):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text(case["line"], encoding="utf-8")
    [prompt] = read_prompt_file(prompts)
    name = picture_name("finetuned_model", now=NOW, step=10, epoch=None, index=0, seed=prompt.seed)
    assert name == case["files"][0].replace("YYYYmmddHHMMSS", "20260203040506")


@pytest.mark.parametrize(
    ("model_name", "epoch", "seed", "expected"),
    [
        ("m", 2, 7, "m_20260203040506_e000002_11_7.png"),
        (None, None, None, "20260203040506_000010_11.png"),
        ("m", None, 0, "m_20260203040506_000010_11_0.png"),
    ],
)
def test_a_name_says_epoch_or_step_and_a_fixed_seed(model_name, epoch, seed, expected):
    assert picture_name(model_name, now=NOW, step=10, epoch=epoch, index=11, seed=seed) == expected


def test_an_image_of_the_moving_average_is_told_apart_and_does_not_replace_that_of_the_weights(tmp_path: Path):
    parts = {"step": 10, "epoch": None, "index": 1, "seed": 7}
    of_weights, of_average = picture_name("m", now=NOW, **parts), picture_name("m", now=NOW, **parts, mark="_ema")
    assert of_average == "m_20260203040506_000010_01_7_ema.png"
    assert PictureName.of(Path(of_average)) == PictureName.of(Path(of_weights))
    earlier = picture_name("m", now=NOW.replace(second=0), **parts, mark="_ema")
    for name in (of_weights, earlier):
        (tmp_path / name).touch()
    assert other_drawings(tmp_path / of_average, NOW.replace(minute=0)) == [tmp_path / earlier]
    assert other_drawings(tmp_path / of_weights, NOW.replace(minute=0)) == []
    assert grid_name("m", now=NOW, step=3, mark="_ema") == "m_20260203040506_000003_grid_ema.png"


# -- what WebUIs read -------------------------------------------------------------------------------------------------


def as_web_uis_parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as the infotext of AUTOMATIC1111's WebUI and its forks is taken apart.

    The last line holds `name: value` with commas between them, values with commas, colons or line ends as JSON texts;
    what stands above is the prompt up to the line that begins with "Negative prompt:".
    """
    *above, settings_line = text.strip().split("\n")
    words = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', settings_line)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in words}
    prompt, _, negative = "\n".join(above).partition("Negative prompt:")
    return prompt.strip(), negative.strip(), settings


def test_web_uis_show_prompt_negative_and_settings():
    assert as_web_uis_parse(parameters_text(RECORD)) == (
        "a cat, sofa",
        "ugly",
        {
            "Steps": "28",
            "Sampler": "Euler a",
            "Schedule type": "Uniform",
            "CFG scale": "7.0",
            "Seed": "42",
            "Size": "832x1216",
            "Model": "finetuned_model",
            "Training step": "500",
            "Prompt L": "film grain",
        },
    )


@pytest.mark.parametrize(
    "text", ["", "a, b: c", 'a "quoted" word', "back\\slash", "two\nlines", "颐和园 🏯, ночь", "Steps: 5, Seed: 1"]
)
def test_any_l_prompt_survives_the_line_of_settings(text: str):
    record = replace(RECORD, prompt=replace(RECORD.prompt, prompt_l=text, negative_l=text), model_name="a, b")
    prompt, negative, settings = as_web_uis_parse(parameters_text(record))
    assert (prompt, negative) == ("a cat, sofa", "ugly")
    assert settings["Prompt L"] == settings["Negative prompt L"] == text
    assert settings["Model"] == "a, b"
    assert settings["Seed"] == "42"


@pytest.mark.parametrize(
    ("sampler", "shown", "schedule"),
    [
        ("ddim", "DDIM", "Automatic"),
        ("pndm", "PLMS", "Automatic"),
        ("k_lms", "LMS", "Uniform"),
        ("k_euler_a", "Euler a", "Uniform"),
        ("heun", "Heun", "Uniform"),
        ("dpm_2", "DPM2", "Uniform"),
        ("k_dpm_2_a", "DPM2 a", "Uniform"),
        ("dpmsolver++", "DPM++ 2M", "SGM Uniform"),
    ],
)
def test_samplers_have_the_names_of_web_uis(sampler: str, shown: str, schedule: str):
    _, _, settings = as_web_uis_parse(parameters_text(replace(RECORD, sampler=sampler)))
    assert (settings["Sampler"], settings["Schedule type"]) == (shown, schedule)


@pytest.mark.parametrize(
    ("name", "written"),
    [("m", "m"), ("my model v2", "my model v2"), ("a, b", '"a, b"'), ("a: b", '"a: b"'), ('"m"', '"\\"m\\""')],
)
def test_the_model_is_in_quotes_only_where_it_must_be(name: str, written: str):
    assert f", Model: {written}, Training step: 500" in parameters_text(replace(RECORD, model_name=name))


def test_without_a_negative_prompt_none_is_shown():
    record = replace(RECORD, prompt=SamplePrompt("a cat", "a cat"))
    prompt, negative, settings = as_web_uis_parse(parameters_text(record))
    assert (prompt, negative) == ("a cat", "")
    assert "Negative prompt L" not in settings


# -- the PNG ----------------------------------------------------------------------------------------------------------


def test_the_png_tells_how_it_was_drawn_in_any_script(tmp_path: Path):
    prompt = SamplePrompt("颐和园 🏯", "фотография", "schäbig", "ぼやけた", guidance_scale=5.5, num_inference_steps=20)
    record = replace(RECORD, prompt=prompt)
    path = tmp_path / "my samples" / "m.png"
    image = Image.new("RGB", (8, 16), (255, 0, 10))
    save_picture(path, image, record)
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert saved.tobytes() == image.tobytes()
        texts = {name: text for name, text in saved.info.items() if name not in ("prompt", "workflow")}
        assert texts == {
            "parameters": parameters_text(record),
            "prompt_g": "颐和园 🏯",
            "prompt_l": "фотография",
            "negative_prompt_g": "schäbig",
            "negative_prompt_l": "ぼやけた",
            "seed": "42",
            "steps": "20",
            "guidance_scale": "5.5",
            "sampler": "euler_a",
            "size": "832x1216",
            "training_step": "500",
            "model": "finetuned_model",
        }


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path):
    (tmp_path / "sample").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        save_picture(tmp_path / "sample" / "m.png", Image.new("RGB", (8, 8)), RECORD)
    assert (tmp_path / "sample").read_text(encoding="utf-8") == "in the way"
