"""The pixels of a visit: those of the part that is drawn, in colours that change a little and keep their mean."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from library.captions.draws import CaptionDraw
from library.images.augmentation import Augmentation
from library.images.augmented import load_augmented, recolored
from library.images.buckets import BucketAssignment, BucketedImage
from library.images.crops import Crop
from library.images.reading import load_rgb
from library.images.resizing import resize_and_crop
from library.sdxl.sizes import Size

DRAW = CaptionDraw(seed=7, epoch=1, key="a/01")
SIZE, RESIZED, BUCKET = Size(203, 100), Size(97, 48), Size(80, 40)
ALL = Augmentation(color_aug=True, random_crop=True, face_crop_aug_range=(1.5, 3.0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return BucketedImage(path, SIZE, BucketAssignment(BUCKET, RESIZED, 0.0))


@pytest.fixture(scope="module")
def face_source(source):
    path = source.path.with_name("a_120_50_20_20.png")
    path.write_bytes(source.path.read_bytes())
    return source._replace(path=path)


def visits(count):
    return [DRAW._replace(epoch=epoch) for epoch in range(1, count + 1)]


# -- the part ---------------------------------------------------------------------------------------------------------


def test_without_augmentation_a_visit_shows_the_centre(source):
    pixels, crop, _ = load_augmented(source, Augmentation(), DRAW)
    np.testing.assert_array_equal(pixels, resize_and_crop(load_rgb(source.path), RESIZED, BUCKET))
    assert (pixels.dtype, crop) == (np.uint8, Crop(8, 4, 9))


@pytest.mark.parametrize("interpolation", [None, "lanczos", "bicubic"])
def test_the_crop_is_where_the_pixels_are_cut_from_the_resized_image(source, interpolation):
    source = source._replace(resize_interpolation=interpolation)
    whole = resize_and_crop(load_rgb(source.path), RESIZED, RESIZED, interpolation=interpolation)
    flipped = whole[:, ::-1]
    seen = set()
    for visit in visits(30):
        pixels, (left, top, left_flipped), _ = load_augmented(source, Augmentation(random_crop=True), visit)
        np.testing.assert_array_equal(pixels, whole[top : top + 40, left : left + 80])
        np.testing.assert_array_equal(pixels[:, ::-1], flipped[top : top + 40, left_flipped : left_flipped + 80])
        seen.add((left, top))
    assert len(seen) > 20


def test_a_crop_around_a_face_shows_the_face_and_says_where(face_source):
    image = load_rgb(face_source.path)
    for visit in visits(20):
        pixels, crop, _ = load_augmented(face_source, Augmentation(face_crop_aug_range=(1.5, 3.0)), visit)
        width = int(crop.left + BUCKET.width + crop.left_flipped)
        resized = Size(width, int(SIZE.height * width / SIZE.width + 0.5))
        whole = resize_and_crop(image, resized, resized)
        left, top = int(crop.left), int(crop.top)
        np.testing.assert_array_equal(pixels, whole[top : top + 40, left : left + 80])
        assert left <= 120 * width / SIZE.width <= left + 80


def test_a_visit_is_the_same_whatever_was_loaded_before(face_source):
    alone = load_augmented(face_source, ALL, DRAW._replace(epoch=3))
    for visit in visits(3):
        pixels, crop, _ = load_augmented(face_source, ALL, visit)
    np.testing.assert_array_equal(pixels, alone[0])
    assert crop == alone[1]


# -- colours ----------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
GREYS = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)


def test_a_third_of_the_visits_are_changed_half_of_them_by_hue():
    count = 3000
    greys_changed = sum(not np.array_equal(recolored(GREYS, visit), GREYS) for visit in visits(count))
    changed = sum(not np.array_equal(recolored(NOISE, visit), NOISE) for visit in visits(count))
    assert abs(changed - 0.33 * count) <= 4 * (0.33 * 0.67 * count) ** 0.5
    # No grey has a hue. A gamma next to 1 rounds to nothing.
    assert abs(greys_changed - 0.165 * count) <= 4 * (0.165 * 0.835 * count) ** 0.5 + 0.02 * count


def test_colours_change_by_little():
    hues, gammas = [], []
    for visit in visits(400):
        changed = recolored(NOISE, visit)
        if np.array_equal(recolored(GREYS, visit), GREYS):
            hues.append(changed)
        else:
            gammas.append(changed)
    # A power of 0.95 to 1.05 moves a value by at most 0.05 / e of 255, and rounding by a half.
    assert max(abs(each.astype(int) - NOISE).max() for each in gammas) <= 0.05 / np.e * 255 * 1.03 + 0.5
    for each in hues:  # brightness and saturation stay, but for rounding
        np.testing.assert_allclose(each.max(-1).astype(int), NOISE.max(-1), atol=1)
        np.testing.assert_allclose(each.min(-1).astype(int), NOISE.min(-1), atol=2)


def test_the_hue_turns_by_up_to_16_degrees_in_both_directions():
    colour = np.full((1, 1, 3), (200, 120, 60), np.uint8)
    [before, *_] = colorsys.rgb_to_hsv(*(colour[0, 0] / 255))
    turns = []
    for visit in visits(1500):
        hue, _, value = colorsys.rgb_to_hsv(*(recolored(colour, visit)[0, 0] / 255))
        if abs(value - 200 / 255) < 1e-6 and hue != before:
            turns.append((hue - before) * 360)
    assert len(turns) > 150
    assert -17.5 < min(turns) < -13
    assert 13 < max(turns) < 17.5


def test_over_many_visits_every_colour_keeps_its_mean():
    count = 3000
    mean = sum(recolored(NOISE, visit).astype(float) for visit in visits(count)) / count
    # A colour moves by up to 0.27 of its range in a sixth of the visits; a turn is not quite even in every channel.
    assert abs(mean.mean() - NOISE.mean()) < 0.25
    assert abs(mean - NOISE).max() < 4


def test_colours_are_drawn_apart_from_the_crop_and_given_pixels_stay():
    before = NOISE.copy()
    for visit in visits(20):
        recolored(NOISE, visit)
    np.testing.assert_array_equal(NOISE, before)
    grey = GREYS[:, :, :].copy()
    brightness = {}
    for visit in visits(200):
        brightness[visit.epoch] = int(recolored(grey, visit)[8, 0, 0])
    assert min(brightness.values()) < 128 < max(brightness.values())
