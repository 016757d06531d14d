"""Which part of an image a visit shows: a function of the visit, anywhere with random_crop, around a face if named."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from library.captions.draws import CaptionDraw
from library.config.errors import UserError
from library.images.augmentation import (
    Augmentation,
    Face,
    Part,
    drawn_part,
    face_in,
    interpolation_of,
    parse_face_range,
)
from library.images.buckets import BucketAssignment, BucketedImage, covering_size
from library.images.crops import Crop, true_crop_ltrb
from library.sdxl.sizes import Size

DRAW = CaptionDraw(seed=7, epoch=1, key="a/01")
RANDOM = Augmentation(random_crop=True)


def image(size, bucket, name="a.png", resized=None):
    resized = resized or covering_size(bucket, size)
    return BucketedImage(Path(name), size, BucketAssignment(bucket, resized, 0.0))


def parts(source, augmentation, num_visits=2000):
    """The parts that the visits of many epochs show."""
    return [drawn_part(source, augmentation, DRAW._replace(epoch=epoch)) for epoch in range(1, num_visits + 1)]


def lies_inside(part, bucket):
    return 0 <= part.left <= part.resized.width - bucket.width and 0 <= part.top <= part.resized.height - bucket.height


# -- random_crop ------------------------------------------------------------------------------------------------------


def test_without_random_crop_it_is_the_centre():
    source = image(Size(203, 100), Size(80, 48))
    left, top, _, _ = true_crop_ltrb(Size(80, 48), Size(97, 48))
    assert set(parts(source, Augmentation(color_aug=True), 20)) == {Part(Size(97, 48), left, top)}


def test_every_position_in_the_resized_image_is_equally_likely():
    source = image(Size(203, 100), Size(80, 40), resized=Size(86, 43))  # 7 columns and 4 rows
    counts = Counter((part.left, part.top) for part in parts(source, RANDOM, 20_000))
    assert counts.keys() == {(left, top) for left in range(7) for top in range(4)}
    expected = 20_000 / 28
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 27 + 4 * (2 * 27) ** 0.5  # mean and four sigma of 27 degrees of freedom


def test_the_crop_says_where_the_part_lies_in_either_direction():
    # The flipped image has on its left what the image has on its right.
    assert Part(Size(97, 48), 5, 0).crop(Size(80, 48)) == Crop(left=5, top=0, left_flipped=12)


@pytest.mark.parametrize(
    "augmentation", [RANDOM, Augmentation(face_crop_aug_range=(2.0, 4.0), random_crop=True)], ids=["anywhere", "face"]
)
def test_a_part_is_a_function_of_the_visit_and_every_visit_has_another(augmentation):
    source = image(Size(3000, 2000), Size(1024, 1024), "a_1500_900_300_400.png")
    part = drawn_part(source, augmentation, DRAW)
    assert drawn_part(source, augmentation, DRAW._replace(step=9, max_train_steps=20)) == part
    others = [
        DRAW._replace(seed=8),
        DRAW._replace(epoch=2),
        DRAW._replace(key="a/02"),
        DRAW._replace(occurrence=1),
    ]
    assert part not in [drawn_part(source, augmentation, other) for other in others]


# -- faces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("anna_512_300_180_200.jpg", Face(512, 300, 180, 200)),
        ("two words_of 2023_512_300_180_200.webp", Face(512, 300, 180, 200)),
        ("anna_512_300_180.jpg", None),
        ("512_300_180_200.jpg", None),
        ("anna_512_300_180_200_b.jpg", None),
        ("anna_0_0_0_0.jpg", None),
        ("holiday_2023_05_12_01.jpg", None),  # no place in an image of 1000x800
        ("anna_512_300_180_-200.jpg", None),
    ],
)
def test_the_name_of_an_image_tells_its_face(name, face):
    assert face_in(Path("folder_1_2_3_4") / name, Size(1000, 800)) == face


FACE_IMAGE = image(Size(3000, 2000), Size(1024, 768), "a_1500_900_300_400.png")


def test_the_part_around_a_face_is_the_asked_number_of_times_as_large():
    shown = parts(FACE_IMAGE, Augmentation(face_crop_aug_range=(2.0, 3.0)))
    factors = np.array([768 / (400 * part.resized.height / 2000) for part in shown])
    assert factors.min() > 1.99
    assert factors.max() < 3.01
    scales = np.array([part.resized.height / 2000 for part in shown])  # these are uniform
    least, most = 768 / (400 * 3), 768 / (400 * 2)
    assert abs(scales.mean() - (least + most) / 2) < 4 * (most - least) / (12 * len(shown)) ** 0.5
    assert all(lies_inside(part, Size(1024, 768)) for part in shown)


def test_a_face_is_in_the_middle_but_for_a_twentieth_of_its_size():
    for part in parts(FACE_IMAGE, Augmentation(face_crop_aug_range=(2.0, 3.0)), 200):
        scale = part.resized.height / 2000
        assert abs(part.left + 512 - 1500 * scale) <= 400 * scale / 20 + 1
        assert abs(part.top + 384 - 900 * scale) <= 400 * scale / 20 + 1


def test_equal_ends_of_the_range_leave_nothing_to_chance():
    assert len(set(parts(FACE_IMAGE, Augmentation(face_crop_aug_range=(2.0, 2.0)), 50))) == 1


def test_with_random_crop_a_face_is_often_near_the_middle_and_sometimes_far():
    shown = parts(FACE_IMAGE, Augmentation(face_crop_aug_range=(2.0, 2.0), random_crop=True))
    offsets = np.array([part.left + 512 - 1500 * part.resized.width / 3000 for part in shown])
    reach = 1500 * shown[0].resized.width / 3000
    # A triangle over the longer distance to an edge, stopped at the edges of the image.
    near = np.mean(abs(offsets) < reach / 4)
    expected = 1 - (1 - 1 / 4) ** 2
    assert abs(near - expected) < 4 * (expected * (1 - expected) / len(shown)) ** 0.5 + 0.01
    assert abs(offsets).max() > reach / 3
    assert all(lies_inside(part, Size(1024, 768)) for part in shown)


@pytest.mark.parametrize(
    ("size", "name", "resized"),
    [
        (Size(3000, 2000), "a_1500_900_30_40.png", Size(3000, 2000)),  # a small face: never enlarged
        (Size(1200, 900), "a_600_450_900_800.png", Size(1024, 768)),  # a large one: the bucket is covered
        (Size(400, 300), "a_200_150_90_80.png", Size(1024, 768)),  # a small image
    ],
)
def test_an_image_is_enlarged_only_to_cover_its_bucket(size, name, resized):
    source = image(size, Size(1024, 768), name)
    assert {part.resized for part in parts(source, Augmentation(face_crop_aug_range=(2.0, 4.0)), 30)} == {resized}


@pytest.mark.parametrize("random_crop", [False, True])
def test_an_image_whose_name_tells_no_face_is_cropped_as_without(random_crop):
    source = image(Size(3000, 2000), Size(1024, 768))
    with_faces = Augmentation(random_crop=random_crop, face_crop_aug_range=(2.0, 4.0))
    assert parts(source, with_faces, 20) == parts(source, Augmentation(random_crop=random_crop), 20)


def test_a_range_is_two_numbers():
    assert parse_face_range("2.0,4.0") == (2.0, 4.0)
    assert parse_face_range("1.5, 1.5") == (1.5, 1.5)


@pytest.mark.parametrize("text", ["", "2", "2.0;4.0", "4,2", "0,2", "-1,2", "2,inf", "nan,2", "1,2,3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="is not a range"):
        parse_face_range(text)


# -- what may vary ----------------------------------------------------------------------------------------------------


def test_a_flip_alone_leaves_latents_that_can_be_cached():
    assert not Augmentation(flip_aug=True, resize_interpolation="area").changes_pixels
    for changing in (
        Augmentation(color_aug=True),
        Augmentation(random_crop=True),
        Augmentation(face_crop_aug_range=(1, 2)),
    ):
        assert changing.changes_pixels


def test_two_names_of_an_interpolation_are_one():
    assert [interpolation_of(name) for name in ("linear", "cubic", "area", None)] == [
        "bilinear",
        "bicubic",
        "area",
        None,
    ]
