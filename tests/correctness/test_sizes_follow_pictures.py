"""Comparison 6: original size, crop and target that the U-Net is told are where the pixels of the picture really are.

The test picture says in its colours where each pixel was: red grows from left to right, green from top to bottom. So
what a training picture shows can be read from its pixels, and compared with what is said about it.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from finetune import prepare_buckets_latents
from library.data.dataset import Batch
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.latents import vae_digest
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.sizes import Size
from tests.conftest import BUCKET_FLAGS
from tests.training_images import captioned, micro_batch, read_set

RULE = BucketRule(Size(128, 128), 64, 256, 64, no_upscale=False)
DIRECTIONS = (False, True)


class Expected(NamedTuple):
    """Original height and width, crop top and left (plain, mirrored), target height and width."""

    original: tuple[int, int]
    crop: tuple[int, int]
    crop_mirrored: tuple[int, int]
    target: tuple[int, int]


# None is square or fills its bucket; what is cut off is an odd number of pixels, more of it right and below.
PICTURES = {
    "wide": Expected((130, 151), (0, 10), (0, 11), (128, 128)),  # shrunk to 149x128
    "tall": Expected((151, 130), (10, 0), (10, 0), (128, 128)),  # shrunk to 128x149
    "small": Expected((118, 100), (11, 0), (11, 0), (128, 128)),  # enlarged to 128x151
    "very wide": Expected((50, 211), (0, 7), (0, 7), (64, 256)),  # enlarged to 270x64
    "on its side": Expected((150, 131), (9, 0), (9, 0), (128, 128)),  # stored as 150x131, EXIF turns it
}


def where_from(height: int, width: int) -> np.ndarray:
    """A picture that says where each pixel lies: red 0-255 from left to right, green from top to bottom."""
    picture = np.zeros((height, width, 3))
    picture[..., 0] = np.linspace(0, 255, width)[None, :]
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture.round().astype(np.uint8)


def crop_seen_in(pixels: torch.Tensor, original: tuple[int, int], mirrored: bool) -> tuple[float, float]:
    """Top and left of the training picture [3, H, W] in the resized one, from the middle of the colours that it shows.

    In a mirrored one, left is counted from the edge that mirroring has brought there.
    """
    (original_height, original_width), (height, width) = original, pixels.shape[1:]
    scale = max(height / original_height, width / original_width)
    red, green = ((channel.mean().item() + 1) / 2 for channel in pixels[:2])
    middle_x, middle_y = (1 - red if mirrored else red) * (original_width - 1), green * (original_height - 1)
    return (middle_y + 0.5) * scale - height / 2, (middle_x + 0.5) * scale - width / 2


@pytest.fixture(scope="module")
def folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, `captions.json` without latents, and in `prepared` the same pictures with them."""
    made = tmp_path_factory.mktemp("where")
    for images in (made / "plain", made / "prepared"):
        images.mkdir()
        for name, expected in PICTURES.items():
            picture = Image.fromarray(where_from(*expected.original))
            exif = Image.Exif()
            if name == "on its side":
                exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
                picture = picture.transpose(Image.Transpose.ROTATE_90)
            picture.save(images / f"{name}.png", exif=exif)
    entries = {name: {"captionG": "", "captionL": ""} for name in PICTURES}
    (made / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
    argv = [made / "prepared", made / "captions.json", made / "prepared.json", tiny_sdxl, "--max_resolution=128,128"]
    assert prepare_buckets_latents.main([*map(str, argv), *BUCKET_FLAGS, "--flip_aug"]) == 0
    return made


@pytest.fixture(scope="module")
def batches(folder: Path, diffusers_model):
    """`batches(kind, flag=True)`: of each picture a batch of both directions, encoded in the step or from its cache."""

    def of(kind: str, **flags: bool) -> dict[str, Batch]:
        metadata = folder / ("captions.json" if kind == "plain" else "prepared.json")
        options = TrainingSetOptions(folder / kind, metadata, enable_bucket=True, flip_aug=True, **flags)
        images = read_set(options, RULE, vae_digest(diffusers_model.vae))
        assert all(image.has_latents != (kind == "plain") for image in images)
        dataset = captioned(images)
        return {image.key: dataset[micro_batch([index, index], DIRECTIONS)] for index, image in enumerate(images)}

    return of


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_time_ids_are_diffusers_own_for_the_sizes_worked_out_by_hand(kind: str, batches, diffusers_model):
    for name, batch in batches(kind).items():
        expected = PICTURES[name]
        time_ids = [
            diffusers_model._get_add_time_ids(
                expected.original,
                crop,
                expected.target,
                dtype=torch.float32,
                text_encoder_projection_dim=diffusers_model.text_encoder_2.config.projection_dim,
            )
            for crop in (expected.crop, expected.crop_mirrored)
        ]
        ours = size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        assert torch.equal(ours, torch.cat(time_ids)), name


def test_the_crop_that_is_told_is_the_one_that_the_pixels_show(batches):
    for name, batch in batches("plain").items():
        for pixels, told, mirrored in zip(batch.pixels, batch.crop_top_lefts.tolist(), DIRECTIONS, strict=True):
            assert pixels.shape[1:] == PICTURES[name].target
            seen = crop_seen_in(pixels, PICTURES[name].original, mirrored)
            # The size before the crop is rounded to whole pixels, by which its middle moves a quarter at most.
            assert seen == pytest.approx(told, abs=0.3), (name, mirrored)


def test_a_mirrored_picture_is_mirrored_in_its_pixels_from_left_to_right(batches):
    for batch in batches("plain").values():
        plain, mirrored = batch.pixels
        assert plain[0, 0, 0] < plain[0, 0, -1]
        assert mirrored[0, 0, 0] > mirrored[0, 0, -1]
        assert plain[1, 0, 0] < plain[1, -1, 0]
        assert mirrored[1, 0, 0] < mirrored[1, -1, 0]


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_with_legacy_crop_coords_the_crop_is_kohyas_and_the_trainer_says_so(kind: str, batches, capsys):
    """Each letterbox by hand: a picture of 151x130 fitted into 128x128 is 110.2 high, and lies 8 below the top."""
    plain = batches(kind)
    assert "--legacy_crop_coords" not in capsys.readouterr().err
    legacy = batches(kind, legacy_crop_coords=True)
    assert "--legacy_crop_coords: the model receives a letterbox offset as crop" in capsys.readouterr().err
    expected = {"wide": [8, 0], "tall": [0, 8], "small": [0, 9], "very wide": [1, 0], "on its side": [0, 8]}
    assert {name: batch.crop_top_lefts[0].tolist() for name, batch in legacy.items()} == expected
    for name, batch in legacy.items():
        assert torch.equal(batch.original_sizes, plain[name].original_sizes)
        assert torch.equal(batch.target_sizes, plain[name].target_sizes)
