"""The examples to copy: the trainer reads them as they stand, their memory is that of the recipes, and they train."""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import skimage
from PIL import Image

import sdxl_train
from finetune import sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import options_of, parse_options
from library.data.caption_options import resolve
from library.data.caption_rules import CaptionDropout, CaptionRules
from library.samples.prompts import read_prompt_file
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.conftest import forget_accelerator
from tests.test_readme import recipes

ROOT = Path(__file__).parents[1]
NAMES = ("style", "character", "concept")
FILES = [(name, gigabytes) for name in NAMES for gigabytes in (12, 24)]
CAPTIONS = {  # L, G
    "style": ("zkfl style, gouache", "a fox asleep under a park bench, autumn leaves on the ground"),
    "character": ("mirav, 1girl, solo, red scarf", "a girl with a red scarf sits on a harbour wall in the evening"),
    "concept": ("photographic", "a knmk lamp on a desk beside a window, morning light"),
}
SMALL = ["--resolution=128,128", "--min_bucket_reso=64", "--max_bucket_reso=256"]
MOMENT = ["--max_train_epochs=1", "--max_data_loader_n_workers=0", "--sample_grid=false"]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`copied(name)` makes "my set" of an example in the current folder: all but the model."""
    monkeypatch.chdir(tmp_path)

    def copy(name: str) -> Path:
        my_set = Path("my set")
        shutil.copytree(ROOT / "examples" / name, my_set)
        images = my_set / "images"
        images.mkdir()
        for photograph in ("chelsea", "coffee"):
            Image.fromarray(getattr(skimage.data, photograph)()).resize((150, 140)).save(images / f"{photograph}.png")
            for suffix, caption in zip(("txt", "caption"), CAPTIONS[name], strict=True):
                (images / f"{photograph}.{suffix}").write_text(caption, encoding="utf-8")
        for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
            assert script.main([str(images), str(my_set / "meta_cap.json")]) == 0
        return my_set

    return copy


def read(argv: Sequence[str]) -> TrainingOptions:
    Path("my set/sd_xl_base_1.0.safetensors").touch()
    return TrainingOptions(*parse_options(OPTION_CLASSES, argv, description="", spellings=TRAINER_SPELLINGS))


def command(gigabytes: int) -> list[str]:
    return [f"--config_file=my set/train_{gigabytes}gb.toml"]


def flags_of_recipe(gigabytes: int) -> list[str]:
    (heading,) = (heading for heading in recipes() if heading.startswith(f"{gigabytes} GB"))
    return shlex.split(recipes()[heading])


@pytest.mark.parametrize(("name", "gigabytes"), FILES)
def test_the_trainer_reads_an_example_and_lacks_nothing_but_the_model(name, gigabytes, copied, capsys):
    copied(name)
    capsys.readouterr()
    assert sdxl_train.main(command(gigabytes)) == 2
    missing = "--pretrained_model_name_or_path: there is no 'my set/sd_xl_base_1.0.safetensors'."
    assert capsys.readouterr().err.splitlines()[0] == f"error: {missing}"


@pytest.mark.parametrize(("name", "gigabytes"), FILES)
def test_the_memory_of_an_example_is_that_of_the_recipe(name, gigabytes, copied):
    copied(name)
    options = read(command(gigabytes))
    flags = flags_of_recipe(gigabytes)
    recipe = read([*command(gigabytes), *flags])
    assert recipe == options
    named = {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}
    text = Path(f"my set/train_{gigabytes}gb.toml").read_text(encoding="utf-8")
    section = text[text.index("[memory]") :]
    assert set(re.findall(r"^(\w+) = ", section, re.MULTILINE)) == named


@pytest.mark.parametrize(("name", "gigabytes"), FILES)
def test_captions_are_treated_as_the_comments_of_an_example_say(name, gigabytes, copied):
    copied(name)
    captions = resolve([vars(read(command(gigabytes)).captions)])
    assert captions.dropout == CaptionDropout(caption_dropout_rate=0.1)
    tags = CaptionRules(shuffle_caption=True, keep_tokens=1, caption_tag_dropout_rate=0.1)
    assert captions.rules_l == (tags if name == "character" else CaptionRules())
    assert captions.rules_g == CaptionRules()


@pytest.mark.parametrize("name", NAMES)
def test_the_prompts_of_an_example_have_a_text_for_each_encoder(name):
    prompts = read_prompt_file(ROOT / "examples" / name / "prompt.txt")
    assert len(prompts) >= 3
    assert not any(prompt.shared for prompt in prompts)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_an_example_is_the_name_of_a_flag(name):
    known = {option.name for option_class in OPTION_CLASSES for option in options_of(option_class)}
    for path in (ROOT / "examples" / name).glob("train_*.toml"):
        assert set(re.findall(r"^(\w+) = ", path.read_text(encoding="utf-8"), re.MULTILINE)) <= known


@pytest.mark.trains
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains(name, copied, tiny_sdxl, capsys):
    my_set = copied(name)
    prompts = (my_set / "prompt.txt").read_text(encoding="utf-8")
    (my_set / "prompt.txt").write_text(prompts.replace("--s 28", "--s 2 --w 64 --h 64"), encoding="utf-8")
    forget_accelerator()
    assert sdxl_train.main([*command(12), f"--pretrained_model_name_or_path={tiny_sdxl}", *SMALL, *MOMENT]) == 0
    assert (my_set / "output" / f"{name}.safetensors").is_file()
    said = capsys.readouterr().out
    assert "captions dropped: both 10 %" in said
    assert ("trained: U-Net, L; frozen: G" if name != "concept" else "trained: U-Net; frozen: L, G") in said
