"""What the pages for users say of files, commands and links is true."""

import re
import shlex
from pathlib import Path

import pytest

import sdxl_train
from library.config.options import options_of
from library.samples.prompts import read_prompt_file
from library.training.run_options import OPTION_CLASSES

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(REPOSITORY / folder / "README.md" for folder in ("", "demo", "examples")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def anchors(page):
    """The names by which the headings of a page can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fenced_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_files_of_the_repository_that_a_page_names_exist(page):
    folders = "benchmarks|demo|docs|finetune|library|tests"
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/-]+\.\w+", text)
    named += [f"tests/{name}.py" for name in re.findall(r"`(\w+/test_\w+)`", text)]  # as the tables shorten it
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]*)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_the_training_command_of_the_readme_has_flags_that_exist():
    (command,) = re.findall(r"^accelerate launch .*$", README, re.MULTILINE)
    arguments = shlex.split(command)
    flags = {
        word.partition("=")[0] for word in arguments[arguments.index("./sdxl_train.py") :] if word.startswith("--")
    }
    known = {option.flag for option_class in OPTION_CLASSES for option in options_of(option_class)}
    assert flags <= known


def refusal(flags, tmp_path, capsys):
    """What the trainer answers to a command with these flags, of which nothing but the model is missing."""
    (tmp_path / "meta_lat.json").write_text("{}", encoding="utf-8")
    paths = [f"--in_json={tmp_path / 'meta_lat.json'}", f"--train_data_dir={tmp_path}", f"--output_dir={tmp_path}"]
    missing = f"--pretrained_model_name_or_path={tmp_path / 'missing.safetensors'}"
    assert sdxl_train.main([*paths, missing, *flags]) == 2
    return capsys.readouterr().err


def recipes():
    """The flags of each recipe of docs/performance.md, by its heading."""
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    part = page[page.index("## Recipes") : page.index("## What takes memory")]
    return dict(re.findall(r"^### ([^\n]*)\n\n```\n(.*?)^```", part, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("recipe", recipes())
def test_each_recipe_of_the_page_on_performance_is_accepted(recipe, tmp_path, capsys):
    answer = refusal(shlex.split(recipes()[recipe], comments=False), tmp_path, capsys)
    assert answer == refusal([], tmp_path, capsys)
    assert "missing.safetensors" in answer


def test_the_example_prompts_differ_in_one_encoder_at_a_time():
    photo, anime, lighthouse, landscape = read_prompt_file(REPOSITORY / "prompt.txt")
    assert photo.prompt_g == anime.prompt_g and photo.prompt_l != anime.prompt_l
    assert photo.prompt_g != lighthouse.prompt_g and photo.prompt_l == lighthouse.prompt_l
    assert landscape.negative_g != landscape.negative_l
    assert not any(prompt.shared for prompt in (photo, anime, lighthouse, landscape))


def test_the_line_of_a_prompt_file_in_the_readme_means_what_it_says(tmp_path):
    (line,) = [block for block in fenced_blocks(README) if "--e photographic" in block]
    (tmp_path / "prompt.txt").write_text(line, encoding="utf-8")
    (prompt,) = read_prompt_file(tmp_path / "prompt.txt")
    assert (prompt.prompt_g, prompt.prompt_l) == ("woman, portrait, in nature", "photographic")
    assert (prompt.width, prompt.height, prompt.seed, prompt.num_inference_steps) == (832, 1216, 1, 28)


def test_the_prompts_of_the_page_on_prompts_mean_the_same_in_every_format(tmp_path):
    page = (REPOSITORY / "docs" / "captions-and-prompts.md").read_text(encoding="utf-8")
    for suffix, beginning in {".txt": "woman", ".toml": "[[prompt]]", ".json": "[{"}.items():
        path = tmp_path / f"prompt{suffix}"
        path.write_text(next(b for b in fenced_blocks(page) if b.startswith(beginning)), encoding="utf-8")
        (prompt,) = read_prompt_file(path)
        assert (prompt.prompt_g, prompt.prompt_l) == ("woman, portrait, in nature", "photographic")
        assert (prompt.width, prompt.height, prompt.seed) == (832, 1216, 1)
