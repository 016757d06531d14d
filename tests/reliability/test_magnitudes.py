"""Numbers of a size that nobody can mean: one line each, before anything is opened, and nothing that takes for ever."""

import json
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from finetune import prepare_buckets_latents
from library.captions.options import CaptionOptions
from library.config.errors import UserError
from library.config.magnitudes import MOST_STEPS
from library.config.options import Option, options_of
from library.config.value_kinds import NumSteps
from library.images.buckets import BucketOptions
from library.sdxl.sizes import Size
from library.training.disk_space import require_disk_for_saves
from library.training.saves import SaveOptions
from tests.conftest import base_flags
from tests.reliability.refusal import said_on_refusal

COMMANDS = {
    sdxl_train: base_flags("model.safetensors", "meta.json", "images", "output"),
    prepare_buckets_latents: ["images", "meta.json", "out.json", "model.safetensors"],
}
LEVELS_OF_THEIR_OWN = (CaptionOptions,)  # a TOML file of subsets sets them too: they are checked where levels meet


def numbers() -> list[tuple[object, Option]]:
    return [
        (script, each)
        for script in COMMANDS
        for option_class in script.OPTION_CLASSES
        if option_class not in LEVELS_OF_THEIR_OWN
        for each in options_of(option_class)
        if each.value_type in (int, float, NumSteps)
    ]


def absurd(option: Option) -> list[str]:
    return ["-1000000000000", "1000000000000", *([] if option.value_type is int else ["nan", "inf", "1e300"])]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with one image, and a model that is none: a message about anything else comes before it."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Path("model.safetensors").write_bytes(b"no model")
    write_entry()


def write_entry(**values: object) -> None:
    Path("meta.json").write_text(json.dumps({"01": {"captionL": "", "captionG": "", **values}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "option"),
    [pytest.param(*each, id=f"{each[0].__name__.rpartition('.')[-1]} {each[1].flag}") for each in numbers()],
)
def test_every_number_on_the_command_line_has_bounds(script, option: Option, capsys):
    for value in absurd(option):
        said = said_on_refusal(script, [*COMMANDS[script], f"{option.flag}={value}"], capsys)
        [line] = [line for line in said.splitlines() if "it must be" in line or " expects " in line]
        assert option.flag in line
        assert "e+" not in line.partition("must be")[2]


@pytest.mark.parametrize(
    "size", [[1, 1], [7, 64], [10**12, 8], [8, 10**12], [8, 1000], [0, 64], [-8, 64], [16392, 16392], [10**400, 8]]
)
@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.__name__.rpartition(".")[-1])
def test_a_size_in_the_metadata_is_one_that_can_be_trained(script, size, capsys):
    write_entry(train_resolution=size)
    said = said_on_refusal(script, COMMANDS[script], capsys)
    assert "image '01': expected train_resolution to be [width, height] in pixels, from 8 to 16384" in said


@pytest.mark.parametrize("size", [[8, 8], [8, 800], [16384, 16384], [818, 1281]])
def test_every_other_size_is_read(size, capsys):
    write_entry(train_resolution=size)
    assert "train_resolution" not in said_on_refusal(sdxl_train, COMMANDS[sdxl_train], capsys)


@pytest.mark.parametrize("resolution", ["1", "7,512", "512,99999", "8,1000", "1000000000000", "0"])
@pytest.mark.parametrize(
    ("script", "flag"), [(sdxl_train, "resolution"), (prepare_buckets_latents, "max_resolution")], ids=["train", "prep"]
)
def test_so_is_the_resolution(script, flag, resolution, capsys):
    said = said_on_refusal(script, [*COMMANDS[script], f"--{flag}={resolution}"], capsys)
    assert f"'{resolution}' is not a resolution." in said


@pytest.mark.parametrize("size", [Size(1, 101), Size(60_000, 60), Size(1, 1_000_000)])
@pytest.mark.parametrize("flags", [{}, {"bucket_no_upscale": True}, {"enabled": False}], ids=str)
def test_an_image_far_longer_than_wide_has_no_bucket(size, flags):
    rule = BucketOptions(bucket_no_upscale=flags.pop("bucket_no_upscale", False)).rule(Size(1024, 1024), **flags)
    with pytest.raises(UserError, match=f"{size} is more than 100 times as long as wide"):
        rule.assign(size)


LIMITS = {
    "steps above the resolution": (["--resolution=256", "--bucket_reso_steps=512"], "--bucket_reso_steps=64"),
    "no multiple of 8": (["--min_bucket_reso=100"], "100"),
    "a smallest side below a step": (["--min_bucket_reso=32"], "--min_bucket_reso=64"),
    "a smallest side above the resolution": (["--resolution=512", "--min_bucket_reso=1024"], "--min_bucket_reso=256"),
    "a largest side below the resolution": (["--resolution=1536", "--max_bucket_reso=1024"], "--max_bucket_reso=3072"),
}


@pytest.mark.parametrize(("flags", "fitting"), LIMITS.values(), ids=LIMITS)
def test_a_limit_of_buckets_that_does_not_fit_is_answered_with_one_that_does(flags, fitting, capsys):
    argv = [*COMMANDS[sdxl_train], "--enable_bucket", *flags]
    said = said_on_refusal(sdxl_train, argv, capsys)
    assert fitting in said
    if "=" in fitting:
        assert "bucket_reso" not in said_on_refusal(sdxl_train, [*argv, fitting], capsys)


def test_an_epoch_has_an_end(capsys, monkeypatch):
    monkeypatch.setattr("library.data.training_set.MOST_VISITS", 999)
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], "--dataset_repeats=1000"], capsys)
    assert "1000 repeats of the images of 'meta.json' make an epoch of 1000 images." in said


@pytest.mark.parametrize("num_steps", [MOST_STEPS, 10**12])
def test_the_saves_of_a_very_long_run_are_added_up_and_not_counted_one_by_one(num_steps, tmp_path):
    options = SaveOptions(
        tmp_path, save_every_n_steps=1, save_last_n_steps=2, save_every_n_epochs=1, save_last_n_epochs=2
    )
    require_disk_for_saves(options, model_bytes=1, state_bytes=1, steps=range(1, num_steps + 1), steps_per_epoch=3)
