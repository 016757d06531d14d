"""What is trained on: which picture and cache a key means, what is stale or missing, and encoding what has none."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.errors import UserError
from library.data.buckets import BucketRule, Size
from library.data.latent_cache import CachedLatents, cache_path, crop_to_train, file_digest, read_cache, write_cache
from library.data.training_set import TrainingSetOptions, encode_missing, read_training_set
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import vae_digest

SIZE = Size(100, 60)
BUCKET = Size(80, 48)
RULE = BucketRule(Size(64, 64), 64, 128, 32, no_upscale=False)
RULES_BUCKET = Size(64, 64)  # of a picture of SIZE; the metadata's own choice in these tests is BUCKET


@dataclass(frozen=True)
class Folder:
    """A training set in the making."""

    path: Path

    @property
    def images(self) -> Path:
        return self.path / "my images"

    def add(self, name="a.png", size=SIZE):
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size.height, size.width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    def add_cache(self, image, bucket=BUCKET, **changes):
        """The cache of a picture as prepare_buckets_latents.py would leave it; changes as of its fields."""
        cached = CachedLatents(
            latents=np.random.default_rng(0).normal(size=(4, bucket.height // 8, bucket.width // 8)).astype(np.float32),
            original_size=SIZE,
            crop_ltrb=(0.0, 0.0, 80.0, 48.0),
            resized_size=BUCKET,
            image_digest=file_digest(image) if image.exists() else "gone",
            vae_digest="vae",
        )
        write_cache(cache_path(image), replace(cached, **changes))
        return cache_path(image)

    def options(self, metadata, **flags):
        """Options that name this folder and the metadata: keys alone, or keys with their entries."""
        captions = {"captionL": "style", "captionG": "content"}
        entries = metadata if isinstance(metadata, dict) else {str(key): captions for key in metadata}
        (self.path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
        return TrainingSetOptions(train_data_dir=self.images, in_json=self.path / "meta.json", **flags)

    def read(self, metadata, **flags):
        return read_training_set(self.options(metadata, **flags), RULE, "vae")


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "my set ü")
    made.images.mkdir(parents=True)
    return made


def entry(resolution=None, caption_l="style", caption_g="content"):
    made = {"captionL": caption_l, "captionG": caption_g}
    return made if resolution is None else made | {"train_resolution": list(resolution)}


# Keys


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("01.png", "01"),
        ("01.v2.png", "01.v2"),
        ("01.png", "{images}/01.png"),
        ("deep/01.png", "deep/01.png"),
        ("deep/01.png", "deep\\01.png"),
    ],
)
@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize("has_picture", [True, False])
def test_a_key_is_a_stem_or_a_path_and_leads_to_picture_and_cache(folder, name, key, has_cache, has_picture):
    key = key.format(images=folder.images)
    image = folder.add(name)
    cache = folder.add_cache(image) if has_cache else None
    if not has_picture:
        image.unlink()
    if not has_cache and not has_picture:
        with pytest.raises(UserError, match="1 images"):
            folder.read([key])
        return
    (found,) = folder.read([key])
    assert (found.key, found.caption_l, found.caption_g, found.size) == (key, "style", "content", SIZE)
    assert found.latents == cache
    assert (found.picture is None) == has_cache
    assert has_cache or found.picture.path == image


def test_captions_and_order_are_those_of_the_metadata(folder):
    for name in "ab":
        folder.add(f"{name}.png")
    images = folder.read({"b": entry(caption_l="", caption_g="é 🏯"), "a": entry(caption_l="x")})
    assert [(image.key, image.caption_l, image.caption_g) for image in images] == [
        ("b", "", "é 🏯"),
        ("a", "x", "content"),
    ]


def test_caches_that_were_copied_to_another_machine_are_found_by_a_path_of_the_first_one(folder):
    folder.add_cache(folder.images / "01.png")
    folder.add_cache(folder.images / "deep" / "02.png")
    keys = ["/elsewhere/01.png", "C:\\pictures\\01.png", "deep/02.png", str(folder.images / "deep" / "02.jpg")]
    assert [image.latents.stem for image in folder.read(keys)] == ["01", "01", "02", "02"]


def test_a_cache_in_the_current_folder_is_not_taken_for_one_of_the_set(folder, monkeypatch):
    folder.add_cache(folder.path / "01.png")
    monkeypatch.chdir(folder.path)
    with pytest.raises(UserError, match=r"1 images of '.*' are not in '.*': 01"):
        folder.read(["01"])


def test_two_pictures_that_would_share_a_cache_are_named(folder):
    images = [folder.add("a.jpg"), folder.add("a.png")]
    with pytest.raises(UserError, match=r"would share the latents file 'a.npz'") as caught:
        folder.read(images)
    assert all(str(image) in caught.value.problem for image in images)


# Missing things


@pytest.mark.parametrize(
    ("letter", "lacking"),
    [("L", {"captionG": "only"}), ("G", {"captionL": "only"}), ("L", {"train_resolution": [8, 8]})],
)
def test_images_without_a_caption_are_listed_with_the_script_to_run(folder, letter, lacking):
    metadata = {f"{number:02}": dict(lacking) for number in range(13)} | {"fine": entry()}
    with pytest.raises(UserError) as caught:
        folder.read(metadata)
    assert f"13 images have no {letter} caption: 00, 01, 02" in caught.value.problem
    assert caught.value.problem.endswith("09 and 3 more.")
    assert f"finetune/sdxl_merge_captions_{letter.lower()}_to_metadata.py" in caught.value.remedy


def test_images_with_neither_picture_nor_cache_are_listed(folder):
    folder.add("a.png")
    with pytest.raises(UserError, match=r"2 images of '.*meta.json' are not in '.*my images': b, c"):
        folder.read(["a", "b", "c"])


def test_empty_metadata_and_a_broken_picture_are_named(folder):
    with pytest.raises(UserError, match=r"meta.json' has no images"):
        folder.read([])
    (folder.images / "a.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"a.png' cannot be used"):
        folder.read(["a"])


def test_options_that_cannot_work_are_all_named(folder):
    bad = TrainingSetOptions(folder.path / "gone", folder.path / "no.json", "12,", dataset_repeats=0, vae_batch_size=0)
    starts = ["--train_data_dir", "--in_json", "--dataset_repeats", "--vae_batch_size", "--resolution"]
    assert [problem.split()[0].strip(":") for problem in bad.problems()] == starts
    assert list(folder.options(["a"]).problems()) == []


# Size and crop


def test_without_cache_the_metadata_chooses_the_bucket_and_else_the_rule(folder):
    for name in "ab":
        folder.add(f"{name}.png")
    chosen, ruled = folder.read({"a": entry(BUCKET), "b": entry()})
    assert (chosen.bucket, chosen.picture.assignment.bucket) == (BUCKET, BUCKET)
    assert (ruled.bucket, ruled.picture.assignment) == (RULES_BUCKET, RULE.assign(SIZE))


def test_with_cache_the_size_is_that_of_the_file_whatever_the_rule_says(folder, capsys):
    folder.add_cache(folder.add())
    (found,) = folder.read({"a": entry()})
    assert (found.bucket, found.size) == (BUCKET, SIZE)
    assert "encoded again" not in capsys.readouterr().err


@pytest.mark.parametrize("legacy", [False, True])
def test_the_crop_is_the_same_from_the_cache_and_from_the_picture(folder, tiny_sdxl, legacy):
    folder.add(size=Size(101, 50))  # shrunk to 97x48: 17 columns go, 8 left and 9 right
    options = folder.options({"a": entry(BUCKET)}, legacy_crop_coords=legacy, cache_latents_to_disk=True)
    (uncached,) = read_training_set(options, RULE, "vae")
    expected = (0, 4, 0) if legacy else (8, 0, 9)
    assert uncached.crop == expected
    encode_missing([uncached], read_vae(tiny_sdxl, torch.float32), options, digest="vae")
    (cached,) = read_training_set(options, RULE, "vae")
    assert isinstance(cached.latents, Path)
    assert cached.crop == expected


def test_a_cache_of_ours_gives_the_legacy_crop_too(folder):
    folder.add_cache(folder.add(), resized_size=Size(97, 48), crop_ltrb=(8.0, 0.0, 88.0, 48.0))
    (true,), (legacy,) = (folder.read(["a"], legacy_crop_coords=legacy) for legacy in (False, True))
    assert true.crop == (8, 0, 9)
    assert legacy.crop == crop_to_train(BUCKET, Size(97, 48), SIZE, legacy=True)


# Stale and damaged caches


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"image_digest": "other"}, {}, "the picture has changed"),
        ({"vae_digest": "other"}, {}, "it was made with another VAE"),
        ({}, {"flip_aug": True}, "it lacks the mirrored latents"),
        ({"bucket": Size(64, 64)}, {}, "it is for 64x64, not 80x48"),
    ],
)
def test_a_stale_cache_is_named_and_its_picture_encoded_again(folder, capsys, changes, flags, reason):
    image = folder.add()
    cache = folder.add_cache(image, **changes)
    (found,) = folder.read({"a": entry(BUCKET)}, **flags)
    assert (found.latents, found.bucket, found.picture.path) == (None, BUCKET, image)
    notice = capsys.readouterr().err
    assert f"'{cache}' does not fit: {reason}" in notice
    assert "It is encoded again." in notice


def test_a_damaged_cache_is_named_and_its_picture_encoded_again(folder, capsys):
    cache = folder.add_cache(folder.add())
    cache.write_bytes(cache.read_bytes()[:100])
    (found,) = folder.read(["a"])
    assert found.latents is None
    assert f"'{cache}' is not a usable latent cache" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["stale", "cut short"])
def test_a_bad_cache_whose_picture_is_gone_is_an_error(folder, damage):
    cache = folder.add_cache(folder.images / "a.png", vae_digest="other" if damage == "stale" else "vae")
    if damage == "cut short":
        cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(UserError, match=r"a.npz' (does not fit|is not a usable).*prepare_buckets_latents.py again"):
        folder.read(["a"])


def test_a_cache_of_the_seed_is_used_though_it_does_not_say_what_it_was_made_from(folder):
    cache = folder.add_cache(folder.add(), image_digest=None, vae_digest=None, resized_size=None)
    (found,) = folder.read({"a": entry(BUCKET)})
    assert found.latents == cache


def test_pictures_are_compared_unless_the_check_is_skipped(folder):
    image = folder.add()
    cache = folder.add_cache(image)
    image.write_bytes(b"no longer a picture")  # to notice this, it must be read
    (unread,) = folder.read(["a"], skip_cache_check=True)
    assert unread.latents == cache
    with pytest.raises(UserError, match=r"a.png' cannot be used"):
        folder.read(["a"])


# Encoding what has no latents


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return read_vae(tiny_sdxl, torch.float32)


def test_latents_in_memory_and_on_disk_are_equal_and_what_was_cached_stays(folder, vae):
    folder.add("a.png")
    folder.add("b.png", Size(60, 100))
    kept = folder.add_cache(folder.add("c.png"), vae_digest=vae_digest(vae))
    metadata = {"a": entry(BUCKET), "b": entry(), "c": entry(BUCKET)}
    options = folder.options(metadata, flip_aug=False, cache_latents=True, vae_batch_size=2)
    images = read_training_set(options, RULE, vae_digest(vae))
    before = kept.read_bytes()

    in_memory = encode_missing(images, vae, options)
    assert [path.name for path in folder.images.glob("*.npz")] == ["c.npz"]
    on_disk = encode_missing(images, vae, replace(options, cache_latents_to_disk=True))
    assert [image.key for image in in_memory] == [image.key for image in on_disk] == ["a", "b", "c"]
    assert in_memory[2] == on_disk[2] == images[2]
    assert kept.read_bytes() == before
    for memory, disk in zip(in_memory[:2], on_disk[:2], strict=True):
        assert disk.latents == cache_path(disk.picture.path)
        read = read_cache(disk.latents)
        for name, value in vars(memory.latents).items():
            np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)


def test_what_was_encoded_to_disk_is_found_by_the_next_run(folder, vae, capsys):
    folder.add()
    options = folder.options({"a": entry()}, flip_aug=True, cache_latents_to_disk=True)
    images = read_training_set(options, RULE, vae_digest(vae))
    encoded = encode_missing(images, vae, options)
    (again,) = read_training_set(options, RULE, vae_digest(vae))
    assert (again.latents, again.bucket, again.crop) == (encoded[0].latents, images[0].bucket, images[0].crop)
    assert "encoded again" not in capsys.readouterr().err


def test_a_stale_cache_is_written_over(folder, vae):
    cache = folder.add_cache(folder.add(), vae_digest="other")
    options = folder.options(["a"], cache_latents_to_disk=True)
    encode_missing(read_training_set(options, RULE, vae_digest(vae)), vae, options)
    assert read_cache(cache).vae_digest == vae_digest(vae)


def test_two_keys_of_one_picture_both_get_its_latents(folder, vae):
    image = folder.add()
    options = folder.options({"a": entry(caption_l="one"), str(image): entry(caption_l="two")}, cache_latents=True)
    first, second = encode_missing(read_training_set(options, RULE, "vae"), vae, options)
    assert (first.caption_l, second.caption_l) == ("one", "two")
    assert first.latents is second.latents is not None


def test_the_fingerprint_of_the_vae_can_be_that_of_its_file(folder, vae):
    folder.add()
    options = folder.options(["a"])
    (image,) = encode_missing(read_training_set(options, RULE, "file"), vae, options, digest="file")
    assert image.latents.vae_digest == "file"


def test_a_picture_that_cannot_be_encoded_is_an_error_that_names_it(folder, vae):
    image = folder.add()
    options = folder.options(["a"], cache_latents=True)
    images = read_training_set(options, RULE, "vae")
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a.png' cannot be used"):
        encode_missing(images, vae, options)


def test_nothing_is_done_where_all_have_latents(folder, vae, capsys):
    folder.add_cache(folder.add())
    images = folder.read(["a"])
    capsys.readouterr()
    assert encode_missing(images, vae, folder.options(["a"])) == images
    assert capsys.readouterr() == ("", "")


def test_stems_are_looked_up_in_the_whole_folder_but_the_top_comes_first(folder):
    for name in ("a.png", "deep/a.png", "deep/b.png"):
        folder.add(name)
    assert [image.picture.path.parent.name for image in folder.read(["a", "b"])] == ["my images", "deep"]
