"""Latent caches: the seed's format, both kinds of crop, what makes a file stale, and every kind of damage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.config.digests import file_digest
from library.config.errors import UserError
from library.data.cache_files import require_separate_caches
from library.data.latent_cache import (
    CacheDemands,
    CachedLatents,
    cache_path,
    read_cache,
    read_fitting,
    write_cache,
)
from library.images.buckets import ALPHA, covering_size
from library.images.crops import crop_to_record, crop_to_train
from library.sdxl.sizes import Size

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "latent_cache.json").read_text(encoding="utf-8"))
GOLDEN_FILES = [
    pytest.param(entry["keys"], id=f"{run}-{entry['npz']}") for run, entries in GOLDEN.items() for entry in entries
]
# A picture neither square nor symmetric, whose crop takes an odd number of columns off the width.
SIZE, BUCKET, RESIZED = Size(451, 300), Size(256, 192), Size(289, 192)
DEMANDS = CacheDemands(vae_digest="vae")
OPAQUE = np.ones((24, 32), dtype=np.float32)


def opacity(height, width):
    return np.random.default_rng(5).random((height, width)).astype(np.float32)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def ours(**changes):
    """A cache as this project writes it, of a picture of `SIZE`."""
    cached = CachedLatents(
        latents=noise(4, 24, 32),
        original_size=SIZE,
        crop_ltrb=crop_to_record(BUCKET, RESIZED, SIZE, legacy=False),
        resized_size=RESIZED,
        image_digest="image",
        vae_digest="vae",
    )
    return replace(cached, **changes)


def seeds_arrays(keys):
    """The arrays of a file of the seed, from what the golden file says of each key."""
    return {
        name: np.array(facts["value"], facts["dtype"]) if "value" in facts else noise(*facts["shape"])
        for name, facts in keys.items()
    }


def golden_size(keys, name):
    return Size(*keys[name]["value"])


def golden_bucket(keys):
    _, height, width = keys["latents"]["shape"]
    return Size(width * 8, height * 8)


def reasons(cached, **demands):
    return cached.reasons_stale(CacheDemands(**{"vae_digest": "vae", **demands}), image_digest="image", bucket=BUCKET)


# The file


def test_everything_comes_back_as_it_was_written(tmp_path):
    written = ours(
        latents_flipped=noise(4, 24, 32)[::-1],
        alpha_mask=opacity(24, 32),
        mask_digest="mask",
        resize_interpolation="bicubic",
    )
    write_cache(tmp_path / "my ü.npz", written)
    read = read_cache(tmp_path / "my ü.npz")
    for name, value in vars(written).items():
        np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)
    assert (read.bucket, read.is_ours) == (BUCKET, True)
    assert [path.name for path in tmp_path.iterdir()] == ["my ü.npz"]


@pytest.mark.parametrize("keys", GOLDEN_FILES)
def test_the_seed_would_find_its_keys_types_and_shapes_in_our_files(tmp_path, keys):
    size, bucket = golden_size(keys, "original_size"), golden_bucket(keys)
    cached = ours(
        latents=noise(*keys["latents"]["shape"]),
        latents_flipped=noise(*keys["latents"]["shape"]) if "latents_flipped" in keys else None,
        original_size=size,
        crop_ltrb=crop_to_record(bucket, covering_size(bucket, size), size, legacy=True),
    )
    write_cache(tmp_path / "a.npz", cached)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        arrays = dict(file)
    ours_alone = {"resized_size", "image_blake2b", "vae_blake2b"}
    assert arrays.keys() - ours_alone == keys.keys()
    for name, facts in keys.items():
        assert (arrays[name].dtype.name, list(arrays[name].shape)) == (facts["dtype"], facts["shape"])
        np.testing.assert_array_equal(arrays[name], facts.get("value", arrays[name]), err_msg=name)


@pytest.mark.parametrize("keys", GOLDEN_FILES)
def test_a_file_with_only_the_seeds_keys_loads_and_is_known_to_be_foreign(tmp_path, keys):
    arrays = seeds_arrays(keys)
    np.savez(tmp_path / "a.npz", **arrays)
    cached = read_cache(tmp_path / "a.npz")
    np.testing.assert_array_equal(cached.latents, arrays["latents"])
    assert (cached.original_size, cached.bucket) == (golden_size(keys, "original_size"), golden_bucket(keys))
    assert (cached.latents_flipped is not None) == ("latents_flipped" in keys)
    assert not cached.is_ours


def test_latents_in_half_precision_are_widened(tmp_path):
    np.savez(tmp_path / "a.npz", latents=noise(4, 2, 2).astype(np.float16), original_size=[9, 9], crop_ltrb=[0] * 4)
    assert read_cache(tmp_path / "a.npz").latents.dtype == np.float32


def test_the_cache_lies_beside_its_picture_under_the_same_stem():
    assert cache_path(Path("my set/01.v2.JPG")) == Path("my set/01.v2.npz")


def test_two_pictures_that_would_share_a_cache_are_both_named():
    require_separate_caches([Path("a/1.png"), Path("b/1.png"), Path("a/2.png"), Path("a/1.png")])
    with pytest.raises(UserError, match=r"'1.jpg' and '1.png' would share the latents file '1.npz'.*rename"):
        require_separate_caches([Path("1.jpg"), Path("1.png")])


# The crop


def mark_in_crop(image, crop_left, crop_top, bucket):
    """Column and row of the one marked pixel, in the part of `image` that the crop keeps."""
    kept = image[crop_top : crop_top + bucket.height, crop_left : crop_left + bucket.width]
    assert kept.shape == (bucket.height, bucket.width)
    row, column = np.argwhere(kept)[0]
    return int(column), int(row)


@pytest.mark.parametrize("resized", [RESIZED, Size(256, 203)], ids=["wide", "tall"])
def test_the_mirrored_crop_cuts_the_mirrored_picture_to_the_mirrored_training_picture(resized):
    picture = np.zeros((resized.height, resized.width), bool)
    picture[100, 60] = True
    crop = crop_to_train(BUCKET, resized, SIZE, legacy=False)
    column, row = mark_in_crop(picture, crop.left, crop.top, BUCKET)
    mirrored = mark_in_crop(picture[:, ::-1], crop.left_flipped, crop.top, BUCKET)
    assert mirrored == (BUCKET.width - 1 - column, row)


def test_the_crop_of_our_file_is_the_true_one_unless_the_legacy_one_is_asked_for_or_recorded():
    true, legacy = (crop_to_train(BUCKET, RESIZED, SIZE, legacy=legacy) for legacy in (False, True))
    assert true == (16, 0, 17)  # 289 columns for 256: 33 go, 16 on the left, 17 on the right
    assert legacy.top > 0  # a letterbox bar above, where nothing is cropped at all
    assert ours().crop(legacy=False) == true
    assert ours().crop(legacy=True) == legacy
    recorded = ours(crop_ltrb=crop_to_record(BUCKET, RESIZED, SIZE, legacy=True), resized_size=None)
    assert recorded.crop(legacy=False) == recorded.crop(legacy=True) == legacy


@pytest.mark.parametrize("keys", GOLDEN_FILES)
def test_the_crop_of_a_file_of_the_seed_is_corrected_unless_the_legacy_one_is_asked_for(tmp_path, keys):
    np.savez(tmp_path / "a.npz", **seeds_arrays(keys))
    cached = read_cache(tmp_path / "a.npz")
    left, top, right, _ = keys["crop_ltrb"]["value"]
    assert cached.crop(legacy=True) == (left, top, cached.bucket.width - right)
    resized = covering_size(cached.bucket, cached.original_size)
    assert cached.crop(legacy=False) == crop_to_train(cached.bucket, resized, cached.original_size, legacy=False)


# Stale files


def test_a_file_that_agrees_in_everything_is_not_stale():
    everything = ours(latents_flipped=noise(4, 24, 32), alpha_mask=opacity(24, 32))
    assert reasons(everything, flip=True, mask=ALPHA, legacy_crop=False, only_ours=True) == []
    assert reasons(ours(resized_size=None), legacy_crop=True) == []


@pytest.mark.parametrize(
    ("changes", "demands", "reason"),
    [
        ({"image_digest": "other"}, {}, "the image has changed"),
        ({"vae_digest": "other"}, {}, "it was made with another VAE"),
        ({"latents": noise(4, 24, 40)}, {}, "it is for 320x192, not 256x192"),
        ({}, {"flip": True}, "it lacks the flipped latents (--flip_aug)"),
        ({}, {"mask": ALPHA}, "it lacks the mask (--alpha_mask)"),
        ({}, {"mask": Path("a.png")}, "it lacks the mask (--conditioning_data_dir)"),
        ({"alpha_mask": OPAQUE}, {"mask": Path("a.png")}, "its mask is its alpha channel, not 'a.png'"),
        (
            {"alpha_mask": OPAQUE, "mask_digest": "mask"},
            {"mask": ALPHA},
            "its mask is that of a file, not its alpha channel",
        ),
        ({}, {"legacy_crop": True}, "it has the other kind of crop (--legacy_crop_coords)"),
        ({"resized_size": None}, {"legacy_crop": False}, "it has the other kind of crop (--legacy_crop_coords)"),
        (
            {},
            {"resize_interpolation": "area"},
            "the image was resized by the usual interpolation, not by area (--resize_interpolation)",
        ),
        (
            {"resize_interpolation": "area"},
            {},
            "the image was resized by area, not by the usual one (--resize_interpolation)",
        ),
        ({"image_digest": None}, {"only_ours": True}, "it does not say what it was made from"),
    ],
)
def test_each_reason_makes_a_file_stale(changes, demands, reason):
    assert reasons(ours(**changes), **demands) == [reason]


def test_all_reasons_are_given_at_once():
    stale = reasons(ours(image_digest="other", vae_digest="other", latents=noise(4, 8, 8)), flip=True)
    assert len(stale) == 4


def test_what_another_program_does_not_say_and_a_picture_that_is_not_looked_at_count_as_fit():
    foreign = ours(image_digest=None, vae_digest=None, resized_size=None)
    assert reasons(foreign) == []
    assert reasons(foreign, resize_interpolation="area") == []
    assert ours().reasons_stale(DEMANDS, image_digest=None, bucket=BUCKET) == []


@pytest.fixture
def cache_of_picture(tmp_path):
    """The cache file of a picture, and the picture."""
    image = tmp_path / "a.png"
    image.write_bytes(b"picture")
    write_cache(cache_path(image), ours(image_digest=file_digest(image)))
    return cache_path(image), image


def test_a_fitting_cache_is_read_with_its_picture_and_without(cache_of_picture):
    path, image = cache_of_picture
    assert read_fitting(path, image, BUCKET, DEMANDS)[0].original_size == SIZE
    assert read_fitting(path, None, None, DEMANDS)[0].original_size == SIZE


def test_a_cache_that_does_not_fit_is_named_with_every_reason(cache_of_picture):
    path, image = cache_of_picture
    image.write_bytes(b"another picture")
    with pytest.raises(UserError) as caught:
        read_fitting(path, image, Size(64, 64), DEMANDS)
    assert caught.value.problem == (f"'{path}' does not fit: the image has changed and it is for 256x192, not 64x64.")
    unchecked = replace(DEMANDS, check_image=False)
    assert read_fitting(path, image, BUCKET, unchecked)[0].original_size == SIZE


def test_the_fingerprint_of_a_file_that_is_gone_is_a_clear_mistake(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*gone.png': No such file"):
        file_digest(tmp_path / "gone.png")


# Damaged files


def assert_named_as_unusable(path, reason=""):
    with pytest.raises(UserError) as caught:
        read_cache(path)
    assert f"'{path}' is not a usable latent cache (" in caught.value.problem
    assert reason in caught.value.problem
    assert caught.value.remedy == "Delete it and run prepare_buckets_latents.py again."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latents": None}, "it lacks latents"),
        ({"crop_ltrb": None, "original_size": None}, "it lacks crop_ltrb, original_size"),
        ({"latents": noise(3, 4, 4)}, "latents are float32 (3, 4, 4), expected float32 (4, h, w)"),
        ({"latents": noise(1, 4, 4, 4)}, "expected float32 (4, h, w)"),
        ({"latents": noise(4, 0, 4)}, "expected float32 (4, h, w)"),
        ({"latents": np.ones((4, 4, 4), int)}, "latents are int64"),
        ({"latents": np.full((4, 4, 4), np.nan)}, "latents hold NaN or Inf"),
        ({"latents": np.full((4, 4, 4), -np.inf)}, "latents hold NaN or Inf"),
        ({"latents": np.array([{}], dtype=object)}, "allow_pickle"),
        ({"latents_flipped": noise(4, 4, 5)}, "latents_flipped is (4, 4, 5), latents (4, 4, 4)"),
        ({"latents_flipped": np.full((4, 4, 4), np.inf)}, "latents hold NaN or Inf"),
        ({"original_size": np.array([40])}, "not enough values"),
        ({"original_size": np.array([0, 40])}, "0x40 is no size"),
        ({"crop_ltrb": np.array([0, 0, 1])}, "not enough values"),
        ({"crop_ltrb": np.array([0, np.nan, 1, 1])}, "crop_ltrb holds NaN or Inf"),
    ],
)
def test_a_file_with_wrong_contents_is_named_with_the_reason(tmp_path, changes, reason):
    arrays = {"latents": noise(4, 4, 4), "original_size": np.array([40, 40]), "crop_ltrb": np.zeros(4)} | changes
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    assert_named_as_unusable(tmp_path / "a.npz", reason)


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_file_that_is_no_archive_is_named(tmp_path, data):
    (tmp_path / "a.npz").write_bytes(data)
    assert_named_as_unusable(tmp_path / "a.npz")


def test_a_single_array_a_folder_and_a_missing_file_are_named(tmp_path):
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, noise(4, 4, 4))
    (tmp_path / "folder.npz").mkdir()
    for name in ("array.npz", "folder.npz", "gone.npz"):
        assert_named_as_unusable(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wherever_a_file_is_cut_or_a_byte_is_wrong_it_is_read_right_or_named(tmp_path, save):
    latents = noise(4, 4, 4)
    save(tmp_path / "whole.npz", latents=latents, original_size=np.array([40, 40]), crop_ltrb=np.zeros(4))
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "damaged.npz"
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position])
        assert_named_as_unusable(path)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x11]) + whole[position + 1 :])
        try:
            np.testing.assert_array_equal(read_cache(path).latents, latents)  # a byte that nothing depends on
        except UserError as error:
            assert str(path) in error.problem


def test_a_cache_that_cannot_be_written_is_named_and_the_old_one_kept(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(UserError, match=r"cannot write '.*a.npz'"):
        write_cache(tmp_path / "a.npz", ours())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
