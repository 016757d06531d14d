"""What is trained on: which picture and cache a key means, its size and crop, what is stale or missing."""

from dataclasses import replace

import numpy as np
import pytest

from library.config.digests import file_digest
from library.config.errors import UserError
from library.config.options import problems_of
from library.data.fingerprints import Fingerprints
from library.data.latent_cache import CachedLatents
from library.data.regularization import repeats_of
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketAssignment, BucketedImage
from library.images.crops import Crop, crop_to_train
from library.sdxl.sizes import Size
from tests.training_images import image_of

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
    assert (found.key, *found.captions, found.size) == (key, ("style",), ("content",), folder.size)
    assert found.latents == cache
    assert (found.source is None) == has_cache
    assert has_cache or found.source.path == image


def test_captions_and_order_are_those_of_the_metadata(folder):
    for name in "ab":
        folder.add(f"{name}.png")
    images = folder.read({"b": folder.entry(caption_l="", caption_g="é 🏯"), "a": folder.entry(caption_l="x")})
    assert [(image.key, *map("".join, image.captions)) for image in images] == [
        ("b", "", "é 🏯"),
        ("a", "x", "content"),
    ]


def test_caches_that_were_copied_to_another_machine_are_found_by_a_path_of_the_first_one(folder):
    for name in ("01.png", "03.png", "deep/02.png", "deep/04.png"):
        folder.add_cache(folder.images / name)
    keys = ["/elsewhere/01.png", "C:\\pictures\\03.png", "deep/02.png", "/elsewhere/my/deep/04.jpg"]
    assert [image.latents.stem for image in folder.read(keys)] == ["01", "03", "02", "04"]


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


def test_stems_are_looked_up_in_the_whole_folder_but_the_top_comes_first(folder):
    for name in ("a.png", "deep/a.png", "deep/b.png"):
        folder.add(name)
    assert [image.source.path.parent.name for image in folder.read(["a", "b"])] == ["my images", "deep"]


def test_metadata_of_sd_scripts_is_read_as_it_is_and_its_sources_are_named(folder, capsys):
    for name in "ab":
        folder.add(f"{name}.png")
    kohya = {"caption": "a girl", "tags": "1girl, solo", "train_resolution": [64, 64]}
    images = folder.read({"a": kohya, "b": kohya})
    assert {(*image.captions.variants_l, *image.captions.variants_g) for image in images} == {("1girl, solo", "a girl")}
    assert "2 images: L from 'tags', G from 'caption'" in capsys.readouterr().out
    images = folder.read({"a": kohya, "b": kohya}, one_caption=True)
    assert {(*image.captions.variants_l, *image.captions.variants_g) for image in images} == {
        ("a girl,1girl, solo",) * 2
    }


def test_regularization_images_of_metadata_are_balanced_and_weighted(folder):
    for name in "abc":
        folder.add(f"{name}.png")
    marked = folder.entry() | {"is_reg": True, "loss_weight": 3}
    images = folder.read(
        {"a": folder.entry(), "b": marked, "c": folder.entry()}, dataset_repeats=3, prior_loss_weight=0.5
    )
    assert repeats_of(images) == [3, 6, 3]
    assert [image.loss_weight for image in images] == [1.0, 1.5, 1.0]
    unmarked = folder.read({"a": folder.entry(), "b": folder.entry(), "c": folder.entry()})
    assert [image.fingerprint() == other.fingerprint() for image, other in zip(images, unmarked, strict=True)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("is_reg", "message"),
    [(True, "all images of '.*meta.json' are regularization images"), (False, "--prior_loss_weight has no effect")],
)
def test_regularization_images_alone_and_a_weight_for_none_are_refused(folder, is_reg, message):
    folder.add("a.png")
    with pytest.raises(UserError, match=message):
        folder.read({"a": folder.entry() | {"is_reg": is_reg}}, prior_loss_weight=0.5)


# Missing things


@pytest.mark.parametrize(
    ("letter", "lacking"),
    [("L", {"captionG": "only"}), ("G", {"captionL": "only"}), ("L", {"train_resolution": [8, 8]})],
)
def test_images_without_a_caption_are_listed_with_the_script_to_run(folder, letter, lacking):
    metadata = {f"{number:02}": dict(lacking) for number in range(13)} | {"fine": folder.entry()}
    with pytest.raises(UserError) as caught:
        folder.read(metadata)
    for each in "L" if "captionG" in lacking else "G" if "captionL" in lacking else "LG":
        assert f"13 images have no {each} caption: 00, 01, 02" in str(caught.value)
    assert "09 and 3 more." in str(caught.value)
    assert f"finetune/sdxl_merge_captions_{letter.lower()}_to_metadata.py" in str(caught.value)


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
    assert sorted(problem.split()[0].strip(":") for problem in problems_of(bad)) == sorted(starts)
    assert list(folder.options(["a"]).problems()) == []


# Size and crop


def test_without_cache_the_metadata_chooses_the_bucket_and_else_the_rule(folder):
    for name in "ab":
        folder.add(f"{name}.png")
    chosen, ruled = folder.read({"a": folder.entry(folder.bucket), "b": folder.entry()})
    assert (chosen.bucket, chosen.source.assignment.bucket) == (folder.bucket, folder.bucket)
    assert (ruled.bucket, ruled.source.assignment) == (Size(64, 64), folder.rule.assign(folder.size))


def test_with_cache_the_size_is_that_of_the_file_whatever_the_rule_says(folder, capsys):
    folder.add_cache(folder.add())
    (found,) = folder.read({"a": folder.entry()})
    assert (found.bucket, found.size) == (folder.bucket, folder.size)
    assert "encoded again" not in capsys.readouterr().err


def test_a_cache_of_ours_gives_the_legacy_crop_too(folder):
    folder.add_cache(folder.add(), resized_size=Size(97, 48), crop_ltrb=(8.0, 0.0, 88.0, 48.0))
    (true,), (legacy,) = (folder.read(["a"], legacy_crop_coords=legacy) for legacy in (False, True))
    assert true.crop == (8, 0, 9)
    assert legacy.crop == crop_to_train(folder.bucket, Size(97, 48), folder.size, legacy=True)


# Stale and damaged caches


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"image_digest": "other"}, {}, "the image has changed"),
        ({"vae_digest": "other"}, {}, "it was made with another VAE"),
        ({}, {"flip_aug": True}, "it lacks the flipped latents"),
        ({"bucket": Size(64, 64)}, {}, "it is for 64x64, not 80x48"),
    ],
)
def test_a_stale_cache_is_named_and_its_picture_encoded_again(folder, capsys, changes, flags, reason):
    image = folder.add()
    cache = folder.add_cache(image, **changes)
    (found,) = folder.read({"a": folder.entry(folder.bucket)}, **flags)
    assert (found.latents, found.bucket, found.source.path) == (None, folder.bucket, image)
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
    (found,) = folder.read({"a": folder.entry(folder.bucket)})
    assert found.latents == cache


def test_pictures_are_compared_unless_the_check_is_skipped(folder):
    image = folder.add()
    cache = folder.add_cache(image)
    image.write_bytes(b"no longer a picture")  # to notice this, it must be read
    (unread,) = folder.read(["a"], skip_cache_check=True)
    assert unread.latents == cache
    with pytest.raises(UserError, match=r"a.png' cannot be used"):
        folder.read(["a"])


# Fingerprints


@pytest.fixture
def fingerprint_of(folder):
    """`fingerprint_of(**entry)` is the fingerprint of the one picture a.png, with latents unless told otherwise."""

    def read(cached: bool = True, **entry) -> str:
        if not (folder.images / "a.png").exists():
            folder.add()
        cache = folder.add_cache(folder.images / "a.png")
        if not cached:
            cache.unlink()
        images = folder.read({"a": folder.entry(resolution=folder.bucket, **entry)}, skip_cache_check=True)
        return Fingerprints(images)["a"]

    return read


def test_the_same_image_has_the_same_fingerprint(fingerprint_of):
    assert fingerprint_of() == fingerprint_of()


@pytest.mark.parametrize("change", [{"caption_l": "other"}, {"caption_g": "other"}, {"cached": False}], ids=str)
def test_captions_and_kind_of_latents_count(fingerprint_of, change: dict):
    assert fingerprint_of(**change) != fingerprint_of()


def test_the_border_between_the_captions_counts(fingerprint_of):
    assert fingerprint_of(caption_l="ab", caption_g="c") != fingerprint_of(caption_l="a", caption_g="bc")


def test_the_picture_counts(fingerprint_of, folder):
    before = fingerprint_of()
    folder.add("a.png", Size(101, 60))
    assert fingerprint_of() != before


def test_the_fingerprints_in_old_states_stay_those_of_their_images(tmp_path):
    size, bucket = Size(100, 75), Size(64, 48)
    path = tmp_path / "a.png"
    path.write_bytes(b"an image")
    latents = CachedLatents(np.arange(192, dtype=np.float32).reshape(4, 6, 8), size, (0, 0, 64, 48))
    ours = replace(latents, image_digest=file_digest(path))

    def image(**facts):
        return image_of("a", "anime", "a cat, 颐和园 \ud83c", size, bucket, Crop(0, 0, 0), **facts)

    source = BucketedImage(path, size, BucketAssignment(bucket, bucket, 0.0))
    assert image(source=source).fingerprint() == "9bbfae64e5d540cc"
    assert image(latents=path, content_digest=ours.content_digest).fingerprint() == "abd383525dc7d2cb"
    assert image(latents=latents, content_digest=latents.content_digest).fingerprint() == "49efaa23a6a24e33"
