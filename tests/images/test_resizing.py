"""Images at the size of their bucket: averaged or by Lanczos, cropped, and never larger in memory than need be."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.images import resizing
from library.images.augmentation import RESIZE_INTERPOLATIONS, interpolation_of
from library.images.buckets import covering_size
from library.images.resizing import resize_and_crop
from library.sdxl.sizes import Size


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def centre(pixels, width, height):
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("resized", [Size(9, 7), Size(4, 5), Size(8, 7), Size(1, 1), Size(3, 6)])
def test_shrinking_averages_the_areas_that_the_new_pixels_cover(resized):
    original = noise(9, 7)
    # Each new pixel is a whole number of pixels of an image enlarged by the new size: an exact mean.
    enlarged = original.repeat(resized.height, axis=0).repeat(resized.width, axis=1).astype(float)
    means = enlarged.reshape(resized.height, 7, resized.width, 9, 3).mean(axis=(1, 3))
    shrunk = resize_and_crop(Image.fromarray(original), resized, resized)
    assert (shrunk.dtype, shrunk.shape) == (np.uint8, (resized.height, resized.width, 3))
    np.testing.assert_allclose(shrunk, means, atol=0.501)  # rounding to whole numbers; float32 sums


def test_enlarging_uses_lanczos():
    image = Image.fromarray(noise(9, 7))
    expected = np.asarray(image.resize((18, 14), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize_and_crop(image, Size(18, 14), Size(18, 14)), expected)


@pytest.mark.parametrize("resized", [Size(20, 15), Size(60, 45)], ids=["shrunk", "enlarged"])
def test_the_crop_is_the_centre_of_the_resized_image(resized):
    image = Image.fromarray(noise(40, 30))
    whole = resize_and_crop(image, resized, resized)
    np.testing.assert_array_equal(resize_and_crop(image, resized, Size(13, 8)), centre(whole, 13, 8))


@pytest.mark.parametrize("interpolation", [None, "lanczos", "nearest", "bilinear", "bicubic", "area", "box"])
@pytest.mark.parametrize("resized", [Size(20, 15), Size(60, 45)], ids=["shrunk", "enlarged"])
def test_any_part_is_the_one_cut_from_the_resized_image(resized, interpolation):
    image = Image.fromarray(noise(40, 30))
    whole = resize_and_crop(image, resized, resized, interpolation=interpolation)
    for left, top in ((0, 0), (7, 3), (resized.width - 13, resized.height - 8)):
        part = resize_and_crop(image, resized, Size(13, 8), corner=(left, top), interpolation=interpolation)
        np.testing.assert_array_equal(part, whole[top : top + 8, left : left + 13])


OPENCV = json.loads((Path(__file__).parent / "resized_by_opencv.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "recorded", OPENCV["resized"], ids=lambda each: f"{each['interpolation']}-{each['width']}x{each['height']}"
)
def test_interpolations_are_those_of_opencv_but_for_rounding(recorded):
    # It computes in fixed point.
    image = Image.fromarray(np.array(OPENCV["image"], np.uint8))
    size = Size(recorded["width"], recorded["height"])
    resized = resize_and_crop(image, size, size, interpolation=recorded["interpolation"])
    assert abs(resized.astype(int) - recorded["pixels"]).max() <= 1


@pytest.mark.parametrize("interpolation", ["lanczos", "box"])
@pytest.mark.parametrize("size", [Size(20, 15), Size(31, 23), Size(17, 11), Size(60, 45)])
def test_these_interpolations_are_those_of_pillow_but_for_rounding(interpolation, size):
    # It rounds after its first pass.
    image = Image.fromarray(noise(40, 30))
    resized = resize_and_crop(image, size, size, interpolation=interpolation)
    expected = np.asarray(image.resize(size, Image.Resampling[interpolation.upper()]))
    assert abs(resized.astype(int) - expected).max() <= (interpolation == "box")


def test_every_interpolation_leaves_an_image_of_the_right_size_as_it_is():
    pixels = noise(40, 30)
    for interpolation in {interpolation_of(name) for name in RESIZE_INTERPOLATIONS}:
        kept = resize_and_crop(Image.fromarray(pixels), Size(40, 30), Size(40, 30), interpolation=interpolation)
        np.testing.assert_array_equal(kept, pixels)


def test_a_mask_keeps_to_the_crop_of_its_image():
    image = Image.fromarray(noise(40, 30))
    mask = image.getchannel("R")
    for resized in (Size(20, 15), Size(60, 45)):
        cropped = resize_and_crop(mask, resized, Size(16, 8))
        assert cropped.shape == (8, 16)
        np.testing.assert_array_equal(cropped, resize_and_crop(image, resized, Size(16, 8))[..., 0])


@pytest.mark.parametrize("size", [Size(40, 30), Size(31, 97), Size(200, 9), Size(7, 300), Size(1, 50), Size(64, 64)])
@pytest.mark.parametrize("bucket", [Size(16, 8), Size(24, 56), Size(128, 64), Size(80, 80)])
@pytest.mark.parametrize("interpolation", [None, "lanczos", "nearest", "bilinear", "bicubic", "area", "box"])
def test_an_image_that_is_cut_first_is_the_same_but_for_rounding(size, bucket, interpolation, monkeypatch):
    # Away from black and white: where Lanczos overshoots, Pillow clips after its first pass, and which that is depends
    # on the size.
    image = Image.fromarray(noise(*size) // 4 + 96)
    resized = covering_size(bucket, size)
    whole = resize_and_crop(image, resized, bucket, interpolation=interpolation).astype(int)
    monkeypatch.setattr(resizing, "LARGE_PIXELS", 0)
    cut = resize_and_crop(image, resized, bucket, interpolation=interpolation).astype(int)
    assert cut.shape == whole.shape
    assert abs(cut - whole).max() <= 1


@pytest.mark.parametrize("size", [Size(1, 1_000_000), Size(1_000_000, 1), Size(3, 400_000)])
def test_a_line_of_pixels_takes_the_memory_of_its_bucket_alone(size):
    # Resized before the crop it would have 512 x 512,000,000 pixels.
    ramp = (np.arange(size.area) * 255 // size.area).astype(np.uint8).reshape(size.height, size.width)
    bucket = Size(512, 512)
    cropped = resize_and_crop(Image.fromarray(ramp).convert("RGB"), covering_size(bucket, size), bucket)
    assert cropped.shape == (512, 512, 3)
    assert np.unique(cropped).tolist() == [127]  # the middle of the ramp
