"""Buckets: the seed's rule, row by row, and the mistakes that a user can make with its limits."""

import json
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.images.buckets import BucketRule, parse_resolution
from library.images.crops import legacy_crop_ltrb, true_crop_ltrb
from library.sdxl.sizes import Size

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "buckets.json").read_text(encoding="utf-8"))
SETTINGS = [pytest.param(setting, id=setting["name"]) for setting in GOLDEN["settings"]]


def rule_of(setting: dict) -> BucketRule:
    return BucketRule(
        max_resolution=Size(*setting["max_reso"]),
        min_bucket_reso=setting["min_bucket_reso"],
        max_bucket_reso=setting["max_bucket_reso"],
        bucket_reso_steps=setting["bucket_reso_steps"],
        no_upscale=setting["bucket_no_upscale"],
    )


def rule(**changes) -> BucketRule:
    defaults = {
        "max_resolution": Size(1024, 1024),
        "min_bucket_reso": 512,
        "max_bucket_reso": 2048,
        "bucket_reso_steps": 64,
        "no_upscale": False,
    }
    return BucketRule(**(defaults | changes))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_list_of_buckets_is_that_of_the_reference(setting):
    expected = [Size(*size) for size in setting["predefined_resos"] or []]
    assert rule_of(setting).sizes() == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_picture_gets_bucket_size_error_and_legacy_crop_of_the_reference(setting):
    bucket_rule = rule_of(setting)
    for row in setting["rows"]:
        image_size = Size(*row["size"])
        bucket, resized, aspect_error = bucket_rule.assign(image_size)
        found = [list(bucket), list(resized), aspect_error, list(legacy_crop_ltrb(bucket, image_size))]
        assert found == [row["bucket"], row["resized"], row["ar_error"], row["legacy_crop_ltrb"]], image_size


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_true_crop_has_the_size_of_the_bucket_and_lies_in_the_middle_of_the_resized_picture(setting):
    for row in setting["rows"]:
        bucket, resized = Size(*row["bucket"]), Size(*row["resized"])
        left, top, right, bottom = true_crop_ltrb(bucket, resized)
        assert (right - left, bottom - top) == bucket
        # An odd rest cannot be halved: the right and the bottom lose the extra pixel.
        assert resized.width - right - left in (0, 1)
        assert resized.height - bottom - top in (0, 1)


def test_without_buckets_every_picture_is_resized_to_cover_the_one_resolution():
    single = rule(max_resolution=Size(1024, 768), enabled=False)
    assert single.sizes() == [Size(1024, 768)]
    assert single.assign(Size(500, 1000)) == (Size(1024, 768), Size(1024, 2048), 1024 / 768 - 0.5)
    assert single.assign(Size(4000, 768)).resized == Size(4000, 768)


def test_a_maximum_that_leaves_no_step_for_the_other_side_gives_no_bucket_without_height():
    sizes = rule(max_resolution=Size(256, 256), min_bucket_reso=128, max_bucket_reso=2048).sizes()
    assert Size(1024, 64) in sizes
    assert all(size.area > 0 for size in sizes)


@pytest.mark.parametrize("image_size", [Size(63, 500), Size(500, 40), Size(6000, 60), Size(60, 6000)])
def test_a_picture_without_room_for_one_step_is_refused_when_it_may_not_be_enlarged(image_size):
    with pytest.raises(UserError, match=f"{image_size} is too small or too narrow.*64 pixels"):
        rule(no_upscale=True).assign(image_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_reso_steps": 0}, "bucket_reso_steps must be positive multiples of 8"),
        ({"bucket_reso_steps": 20}, "bucket_reso_steps must be positive multiples of 8.*20"),
        ({"max_resolution": Size(512, 32)}, "bucket_reso_steps .64. exceeds a side of the resolution 512x32"),
        ({"min_bucket_reso": 300}, "min_bucket_reso and max_bucket_reso must be .*300, 2048"),
        ({"min_bucket_reso": 32}, "min_bucket_reso .32. is below bucket_reso_steps .64."),
        (
            {"max_resolution": Size(512, 256), "min_bucket_reso": 576},
            "min_bucket_reso .576. is above .* 512x256",
        ),
        ({"max_bucket_reso": 1000}, "max_bucket_reso .1000. is below .* the resolution 1024x1024"),
        ({"max_resolution": Size(1000, 1001), "enabled": False}, "sides of the resolution must be .*1000, 1001"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        rule(**changes)


def test_limits_of_the_list_do_not_matter_where_there_is_no_list():
    assert rule(no_upscale=True, max_bucket_reso=256).assign(Size(640, 480)).bucket == Size(640, 448)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", (1024, 1024)), ("1216,832", (1216, 832)), ("832x1216", (832, 1216)), (" 512 , 768 ", (512, 768))],
)
def test_a_resolution_is_one_number_or_two(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "big", "1024,", "1024,1024,3", "0", "1024,0", "-512", "512.5", "1024;1024"])
def test_any_other_text_is_no_resolution(text):
    with pytest.raises(UserError, match=r"is not a resolution.*width,height"):
        parse_resolution(text)
