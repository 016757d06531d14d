"""Photographs without captions, and small models that write some."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
from PIL import Image

from library.data.metadata import CaptionColumn
from tests.annotation.tiny_captioners import write_blip, write_llava
from tests.annotation.tiny_tagger import write_tagger

PHOTOGRAPHS = ("astronaut", "cat", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="session")
def tagger(tmp_path_factory) -> Path:
    """The folder of a tagger whose outputs are known."""
    return write_tagger(tmp_path_factory.mktemp("tagger"))


@pytest.fixture(scope="session")
def blip(tmp_path_factory) -> Path:
    """A tiny image-to-text model with random weights."""
    return write_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A tiny chat model with random weights."""
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder of bare photographs, whose name shells stumble over."""
    folder = tmp_path / "my set ü 颐"
    folder.mkdir()
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).resize((96, 64)).save(folder / f"{name}.png")
    return folder


def captions_in(folder: Path, extension: str) -> dict[str, str]:
    """The caption files of a folder and its subfolders, by name."""
    files = sorted(folder.rglob(f"*{extension}"))
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files}


def merged_captions(merge_script, folder: Path, column: CaptionColumn) -> dict[str, str]:
    """What a merge script makes of a folder, as `captions_in` has the files that it read."""
    out = folder.parent / "meta.json"
    assert merge_script.main([str(folder), str(out)]) == 0
    entries = json.loads(out.read_text(encoding="utf-8")).items()
    return {f"{key}{column.caption_extension}": f"{entry[column.metadata_key]}\n" for key, entry in entries}


def run(script, folder: Path, *flags: object) -> int:
    """Run a script on a folder in this process; return its status."""
    main: Callable[[list[str]], int] = script.main
    return main([str(folder), *map(str, flags)])
