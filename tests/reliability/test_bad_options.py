"""Mistakes on the command line, in option files and in the way of the output: status 2 from every script."""

from pathlib import Path

import pytest

import sdxl_train
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from tests.conftest import base_flags
from tests.reliability.refusal import said_on_refusal

COMMANDS = {
    sdxl_train: base_flags("model.safetensors", "meta.json", "images", "output"),
    prepare_buckets_latents: ["images", "meta.json", "out.json", "model.safetensors"],
    sdxl_merge_captions_g_to_metadata: ["images", "out.json"],
    sdxl_merge_captions_l_to_metadata: ["images", "out.json"],
}
SCRIPTS = pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.__name__.rpartition(".")[-1])


pytestmark = pytest.mark.usefixtures("folder_without_model")


@SCRIPTS
@pytest.mark.parametrize(
    ("flag", "problem"),
    [("--nonsense_flag=1", "unknown flag --nonsense_flag. See --help."), ("stray", "unexpected argument 'stray'.")],
)
def test_what_belongs_to_no_option_is_named(script, flag: str, problem: str, capsys):
    assert problem in said_on_refusal(script, [*COMMANDS[script], flag], capsys)


@pytest.mark.parametrize(
    ("script", "flag", "nearest"),
    [
        (sdxl_train, "--learning_rat=1", "--learning_rate"),
        (prepare_buckets_latents, "--batchsize=1", "--batch_size"),
        (sdxl_merge_captions_g_to_metadata, "--recursiv", "--recursive"),
        (sdxl_merge_captions_l_to_metadata, "--ful_path", "--full_path"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(script, flag: str, nearest: str, capsys):
    assert f"Did you mean {nearest}?" in said_on_refusal(script, [*COMMANDS[script], flag], capsys)


@pytest.mark.parametrize("flag", ["in_json", "train_data_dir", "output_dir", "sample_prompts", "logging_dir"])
@pytest.mark.parametrize("value", ["a\0b", "a" * 300, "images/" + "ü" * 200], ids=["NUL", "300", "bytes"])
def test_a_path_that_no_system_takes_is_named(flag: str, value: str, capsys):
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], f"--{flag}={value}"], capsys)
    assert f"--{flag} expects a path" in said


@pytest.mark.parametrize("flag", ["in_json", "train_data_dir", "output_dir"])
def test_an_empty_path_is_none_and_what_every_run_needs_is_missing_then(flag: str, capsys):
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], f"--{flag}="], capsys)
    assert f"--{flag} is missing" in said


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "vae"])
def test_a_model_name_longer_than_any_file_name_is_named(flag: str, capsys):
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], f"--{flag}={'a' * 5000}"], capsys)
    assert f"--{flag}: there is no 'aaa" in said


def test_a_resolution_of_thousands_of_digits_is_none(capsys):
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], f"--resolution={'8' * 5000}"], capsys)
    assert "is not a resolution" in said


TOML = {
    "no TOML": ("learning_rate = ", "'options.toml' is not valid TOML: "),
    "nested too deeply": ("learning_rate = " + "[" * 5000, "is not valid TOML: it is nested too deeply."),
    "digits without end": ("seed = 0x" + "F" * 5000, "it holds a whole number of more than 64 bits."),
    "digits beyond printing": ("seed = " + "9" * 5000, "'options.toml' is not valid TOML: Exceeds the limit"),
    "an unknown key": ("learning_rat = 1e-5", "unknown key 'learning_rat'. Did you mean learning_rate?"),
    "a refused key": ("clip_skip = 2", "clip_skip: SDXL was trained on the last block but one"),
    "no number": ("learning_rate = nan", "--learning_rate is nan; it must be 0 or more"),
    "text for a number": ("max_train_steps = 'five'", "--max_train_steps expects a whole number"),
    "a path with NUL": ('in_json = "a\\u0000b"', "--in_json expects a path"),
}


@pytest.mark.parametrize(("text", "problem"), TOML.values(), ids=TOML)
def test_a_mistake_in_the_file_of_options_is_named(text: str, problem: str, capsys):
    Path("options.toml").write_text(text, encoding="utf-8")
    argv = [*COMMANDS[sdxl_train], "--config_file=options.toml"]
    assert problem in said_on_refusal(sdxl_train, argv, capsys)


PROMPTS = {
    "JSON nested too deeply": ("p.json", "[" * 100_000, "'p.json' is not a list of prompts (maximum recursion depth"),
    "JSON of endless digits": ("p.json", "[" + "9" * 5000 + "]", "'p.json' is not a list of prompts (Exceeds"),
    "TOML nested too deeply": ("p.toml", "prompt = " + "[" * 5000, "'p.toml' is not valid TOML: it is nested"),
    "TOML of endless digits": ("p.toml", "[prompt]\nseed = 0x" + "F" * 5000, "a whole number of more than 64 bits"),
    "a size of endless digits": ("p.txt", "a cat\na dog --w " + "9" * 5000, "'p.txt', line 2: --w is '999"),
    "a folder": (".", "", "'.' is not a prompt file."),
}


@pytest.mark.parametrize(("name", "text", "problem"), PROMPTS.values(), ids=PROMPTS)
def test_a_mistake_in_the_prompt_file_is_named_before_the_model_is_opened(name, text, problem, capsys):
    if text:
        Path(name).write_text(text, encoding="utf-8")
    argv = [*COMMANDS[sdxl_train], f"--sample_prompts={name}", "--sample_every_n_steps=1"]
    assert problem in said_on_refusal(sdxl_train, argv, capsys)


@pytest.mark.parametrize("folder", ["occupied", "occupied/below"])
def test_a_file_in_place_of_the_output_folder_is_named_before_the_model_is_opened(folder: str, capsys):
    Path("occupied").write_text("mine", encoding="utf-8")
    said = said_on_refusal(sdxl_train, [*COMMANDS[sdxl_train], f"--output_dir={folder}"], capsys)
    assert "--output_dir: 'occupied' is a file; name a folder." in said.replace(f"{Path.cwd()}/", "")
    assert Path("occupied").read_text(encoding="utf-8") == "mine"
