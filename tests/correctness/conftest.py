"""What the comparisons share: eight photographs in two buckets, and the tiny SDXL as diffusers reads it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import skimage
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from finetune import prepare_buckets_latents
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from tests.conftest import BUCKET_FLAGS, PreparedSet, merge_captions

CAPTIONS = {  # photograph: G caption, L caption
    "astronaut": ("a woman in a space suit!", "official portrait"),
    "chelsea": ("a cat looks to the left", "close-up, soft light"),
    "coffee": ("a cup of coffee, “a spoon”", ""),
    "rocket": ("a rocket on its launch pad &amp; floodlights", "news photograph"),
}


class Shape(NamedTuple):
    """What becomes of a photograph of `size`; width before height, left before top."""

    size: tuple[int, int]
    bucket: tuple[int, int]
    crop: tuple[int, int]


SHAPES = {
    "whole": Shape((140, 130), (128, 128), (5, 0)),  # covers its bucket as 138x128
    "strip": Shape((240, 62), (256, 64), (0, 1)),  # as 256x66
}


@pytest.fixture(scope="session")
def two_buckets(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Four photographs in each of two buckets, as the three scripts leave them. Not to be written to."""
    made = PreparedSet(tmp_path_factory.mktemp("sets") / "two buckets")
    made.images.mkdir(parents=True)
    for photograph, (caption_g, caption_l) in CAPTIONS.items():
        for part, shape in SHAPES.items():
            name = f"{photograph} {part}"
            Image.fromarray(getattr(skimage.data, photograph)()).resize(shape.size).save(made.images / f"{name}.png")
            (made.images / f"{name}.caption").write_text(f"{caption_g}, {part}", encoding="utf-8")
            (made.images / f"{name}.txt").write_text(caption_l, encoding="utf-8")
    merge_captions(made)
    argv = [made.images, made.captions_json, made.latents_json, tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    assert prepare_buckets_latents.main([str(argument) for argument in argv]) == 0
    return made


@pytest.fixture(scope="session")
def tiny_folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL as a diffusers folder, for the configurations that diffusers would otherwise fetch from the hub."""
    folder = tmp_path_factory.mktemp("folders") / "tiny sdxl"
    write_diffusers_folder(folder, read_single_file(tiny_sdxl, ModelDtypes()), None)
    return folder


@pytest.fixture(scope="session")
def diffusers_model(tiny_sdxl: Path, tiny_folder: Path) -> StableDiffusionXLPipeline:
    """The tiny SDXL as diffusers reads it, in float32. Not to be changed: train a copy."""
    return StableDiffusionXLPipeline.from_single_file(
        str(tiny_sdxl), config=str(tiny_folder), torch_dtype=torch.float32
    )
