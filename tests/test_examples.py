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
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import options_of, parse_options
from library.samples.prompts import read_prompt_file
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.conftest import forget_accelerator
from tests.test_readme import recipes

ROOT = Path(__file__).parents[1]
NAMES = ("style", "character", "concept")
FILES = [(name, gigabytes) for name in NAMES for gigabytes in (12, 16, 24)]
FOLDERS = {"style": ("images",), "character": ("images",), "concept": ("images", "lamps")}
CAPTIONS = {  # L, G
    "style": ("zkfl style, gouache", "a fox asleep under a park bench, autumn leaves on the ground"),
    "character": ("mirav, 1girl, solo, red scarf", "a girl with a red scarf sits on a harbour wall in the evening"),
    "concept": ("photographic", "a knmk lamp on a desk beside a window, morning light"),
}
SMALL = {  # what is changed in a copy to train the tiny SDXL for a moment
    "dataset.toml": {
        "resolution = 1024": "resolution = 128",
        "min_bucket_reso = 512": "min_bucket_reso = 64",
        "max_bucket_reso = 2048": "max_bucket_reso = 256",
    },
    "prompt.txt": {"--s 28": "--s 2 --w 64 --h 64"},
}


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`copied(name)` makes "my set" of an example in the current folder: all but the model."""
    monkeypatch.chdir(tmp_path)

    def copy(name: str) -> Path:
        my_set = Path("my set")
        shutil.copytree(ROOT / "examples" / name, my_set)
        for folder in FOLDERS[name]:
            (my_set / folder).mkdir()
            for photograph in ("chelsea", "coffee"):
                image = Image.fromarray(getattr(skimage.data, photograph)()).resize((150, 140))
                image.save(my_set / folder / f"{photograph}.png")
                for suffix, caption in zip(("txt", "caption"), CAPTIONS[name], strict=True):
                    (my_set / folder / f"{photograph}.{suffix}").write_text(caption, encoding="utf-8")
        return my_set

    return copy


def read(argv: Sequence[str]) -> TrainingOptions:
    Path("my set/sd_xl_base_1.0.safetensors").touch()
    return TrainingOptions(*parse_options(OPTION_CLASSES, argv, description="", spellings=TRAINER_SPELLINGS))


def command(gigabytes: int) -> list[str]:
    return [f"--config_file=my set/train_{gigabytes}gb.toml"]


def flags_of_recipe(gigabytes: int) -> list[str]:
    (heading,) = (heading for heading in recipes() if heading.startswith(f"{gigabytes} GB ("))
    return shlex.split(recipes()[heading])


@pytest.mark.parametrize(("name", "gigabytes"), FILES)
def test_the_trainer_reads_an_example_and_lacks_nothing_but_the_model(name, gigabytes, copied, capsys):
    copied(name)
    assert sdxl_train.main(command(gigabytes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and error.count("error:") == 1
    assert "sd_xl_base_1.0.safetensors" in error and "train_" not in error and "dataset" not in error


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


@pytest.mark.parametrize(("name", "batch_size"), [*((name, size) for name in NAMES for size in (4, 8))])
def test_the_subsets_of_an_example_are_what_its_comments_say(name, batch_size, copied):
    copied(name)
    subsets = read(command({4: 12, 8: 24}[batch_size])).subsets()
    assert [subset.image_dir.name for subset in subsets] == [*FOLDERS[name]]
    for subset in subsets:
        assert subset.batch_size == batch_size
        assert subset.captions.dropout.caption_dropout_rate == 0.1
        assert (subset.captions.rules_l.shuffle_caption, subset.captions.rules_l.keep_tokens) == (
            (True, 1) if name == "character" else (False, 0)
        )
        assert subset.captions.rules_g.changes_nothing
    assert [subset.is_reg for subset in subsets] == [False, True][: len(subsets)]


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
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_an_example_trains(name, copied, tiny_sdxl, capsys):
    my_set = copied(name)
    for file, changes in SMALL.items():
        text = (my_set / file).read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (my_set / file).write_text(text, encoding="utf-8")
    forget_accelerator()
    flags = [f"--pretrained_model_name_or_path={tiny_sdxl}", "--max_train_epochs=1", "--max_data_loader_n_workers=0"]
    assert sdxl_train.main([*command(12), *flags]) == 0
    assert (my_set / "output" / f"{name}.safetensors").is_file()
    assert "both 10 %" in capsys.readouterr().out
