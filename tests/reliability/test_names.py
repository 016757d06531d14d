"""Names and texts that are needed only at the end of a run are tried before a model is opened."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import sdxl_train
from tests.conftest import base_flags
from tests.reliability.refusal import said_on_refusal

NAMES = {
    "long": ("m" * 300, "(File name too long)"),
    "long in bytes": ("猫" * 80, "(File name too long)"),
    "no room for the suffixes": ("m" * 240, "(File name too long)"),
    "the folder above": ("..", "it means a folder"),
    "a folder elsewhere": ("../../x", "'..'"),
    "an absolute path": ("/tmp/x", "separates folders"),
    "backslashes": ("a\\b", "'\\' separates folders"),
    "a drive": ("C:x", "Windows allows no : in a name"),
    "a question": ("what?", "Windows allows no ? in a name"),
    "a device": ("nul", "Windows takes nul for a device"),
    "a dot behind": ("m.", "Windows allows no dot or space at the end"),
    "a control character": ("a\x1b[2Jb", "character 2 is a control character"),
    "a byte that is no UTF-8": ("a\udcff", "character 2 is no UTF-8"),
}
FLAGS_OF_NAMES = ["output_name", "log_tracker_name", "log_prefix"]
HARMLESS_IN_A_PREFIX = {"a device", "a dot behind", "the folder above", "no room for the suffixes"}  # more follows it
TRACKER_HAS_ROOM = {"no room for the suffixes"}
OTHER_REASON = {  # where / is allowed, or comes first
    ("log_prefix", "a folder elsewhere"): "it means a folder",
    ("log_prefix", "an absolute path"): "it is empty",
    ("output_name", "a folder elsewhere"): "'/' separates folders",
    ("log_tracker_name", "a folder elsewhere"): "'/' separates folders",
}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("folder_without_model")]  # a run for each


def train(*flags: str) -> list[str]:
    return [*base_flags("model.safetensors", "meta.json", "images", "output"), *flags]


def files() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*"))


def cases() -> Iterator[Any]:
    for flag in FLAGS_OF_NAMES:
        for kind, (name, reason) in NAMES.items():
            harmless = HARMLESS_IN_A_PREFIX if flag == "log_prefix" else TRACKER_HAS_ROOM
            if flag == "output_name" or kind not in harmless:
                expected = OTHER_REASON.get((flag, kind), reason)
                yield pytest.param(flag, name, expected, id=f"{flag}: {kind}")


@pytest.mark.parametrize(("flag", "name", "reason"), [*cases()])
def test_a_name_that_cannot_be_written_ends_the_run_before_the_model_is_opened(flag, name, reason, capsys):
    before = files()
    said = said_on_refusal(sdxl_train, train(f"--{flag}={name}", "--logging_dir=logs"), capsys)
    assert f"--{flag}" in said
    assert reason in said
    assert files() == before


@pytest.mark.parametrize("length", [5000, 4060])  # of 4095 that Linux takes
def test_a_path_that_is_too_long_as_a_whole_is_refused(length, capsys):
    deep = "/".join(["d" * 200] * 30)[: length - len(f"{Path.cwd()}/")].rstrip("/")
    said = said_on_refusal(sdxl_train, train(f"--output_dir={deep}", "--output_name=m"), capsys)
    assert ("--output_dir expects a path" if length == 5000 else "(File name too long)") in said


TEXTS = {
    "metadata_title": {"metadata_title": "a\0b"},
    "metadata_author": {"metadata_author": "a\0b"},
    "metadata_description": {"metadata_description": "a\0b"},
    "metadata_license": {"metadata_license": "a\0b"},
    "metadata_tags": {"metadata_tags": "a\0b"},
    "wandb_run_name": {"wandb_run_name": "a\0b", "logging_dir": "logs"},
    "output_name": {"output_name": "a\0b"},
    "log_prefix": {"log_prefix": "a\0b", "logging_dir": "logs"},
    "log_tracker_name": {"log_tracker_name": "a\0b", "logging_dir": "logs"},
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["NUL", "no UTF-8"])
def test_a_text_that_no_file_can_hold_ends_the_run_before_the_model_is_opened(name, kind, capsys):
    if kind == "NUL":  # a command line cannot hold it, a file of options can
        Path("options.toml").write_text(tomli_w.dumps(TEXTS[name]), encoding="utf-8")
        argv = train("--config_file=options.toml")
    else:  # what Python makes of bytes on the command line that are no UTF-8
        argv = train(*(f"--{flag}={value}".replace("\0", "\udcff") for flag, value in TEXTS[name].items()))
    said = said_on_refusal(sdxl_train, argv, capsys)
    assert f"--{name}" in said


@pytest.mark.parametrize(("text", "problem"), [("a\0b", "is NUL"), ("\ud83d", "is no UTF-8")])
def test_so_does_a_prompt(text, problem, capsys):
    Path("prompts.json").write_text(json.dumps([{"prompt": text}]), encoding="utf-8")
    argv = train("--sample_prompts=prompts.json", "--sample_at_first")
    assert problem in said_on_refusal(sdxl_train, argv, capsys)
