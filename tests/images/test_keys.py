"""Which image a metadata key means."""

import os
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.images.keys import image_key, images_by_stem, keys_of_images, resolve_image


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_key_is_the_stem_or_the_path_as_given():
    path = Path("my set") / "deep" / "01.final.jpg"
    assert image_key(path, full_path=False) == "01.final"
    assert image_key(path, full_path=True) == str(path)


def test_two_images_of_one_key_are_both_named():
    images = [Path("set/a.jpg"), Path("set/b.jpg"), Path("set/deep/a.png")]
    with pytest.raises(UserError) as error:
        keys_of_images(images, full_path=False)
    assert all(text in str(error.value) for text in (f"'{images[0]}'", f"'{images[2]}'", "--full_path"))
    assert list(keys_of_images(images, full_path=True).values()) == images


def test_a_stem_means_the_image_at_the_top_and_else_the_one_below(tmp_path):
    touch(tmp_path, "a.jpg", "deep/a.png", "deep/b.png", "deep/er/c.d.webp", "a.txt")
    index = images_by_stem(tmp_path)
    assert resolve_image("a", tmp_path, index) == tmp_path / "a.jpg"
    assert resolve_image("b", tmp_path, index) == tmp_path / "deep" / "b.png"
    assert resolve_image("c.d", tmp_path, index) == tmp_path / "deep" / "er" / "c.d.webp"
    assert resolve_image("absent", tmp_path, index) is None


@pytest.mark.parametrize("images", [("a.jpg", "a.png"), ("x/a.jpg", "y/a.jpg")])
def test_a_stem_that_could_mean_two_images_is_an_error_only_where_it_is_used(tmp_path, images):
    touch(tmp_path, *images, "b.jpg")
    index = images_by_stem(tmp_path)
    assert resolve_image("b", tmp_path, index) == tmp_path / "b.jpg"
    with pytest.raises(UserError, match="the key 'a' could refer to") as error:
        resolve_image("a", tmp_path, index)
    assert all(str(tmp_path / image) in str(error.value) for image in images)


@pytest.mark.parametrize(
    "key", ["{set}/deep/b ü.png", "my set/deep/b ü.png", "my set\\deep\\b ü.png", "deep/b ü.png", "deep\\b ü.png"]
)
def test_a_path_may_be_absolute_or_relative_to_here_or_to_the_folder(tmp_path, monkeypatch, key):
    touch(tmp_path, "my set/deep/b ü.png", "my set/b ü.png")
    monkeypatch.chdir(tmp_path)
    folder = Path("my set")
    found = resolve_image(key.format(set=tmp_path / "my set"), folder, images_by_stem(folder))
    assert found.samefile(tmp_path / "my set" / "deep" / "b ü.png")


def test_an_image_of_the_folder_comes_before_one_of_the_current_folder(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "my set/a.png", "my set/my set/a.png")
    monkeypatch.chdir(tmp_path)
    folder = Path("my set")
    for key, image in (("a.png", "my set/a.png"), ("my set/a.png", "my set/a.png")):
        assert resolve_image(key, folder, images_by_stem(folder)).samefile(tmp_path / image)


@pytest.mark.parametrize("key", ["../outside.png", "deep/../../outside.png", "..\\outside.png"])
def test_a_key_that_climbs_out_of_the_folder_is_refused(tmp_path, key):
    touch(tmp_path, "set/deep/a.png", "outside.png")
    folder = tmp_path / "set"
    with pytest.raises(UserError, match=r"outside\.png', outside the image folder"):
        resolve_image(key, folder, images_by_stem(folder))


def test_a_key_may_climb_as_long_as_it_ends_in_the_folder(tmp_path, monkeypatch):
    # This is what --full_path writes for a folder that was given as "../set".
    touch(tmp_path, "set/a.png", "elsewhere/b.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = Path(os.pardir) / "set"
    key = image_key(folder / "a.png", full_path=True)
    assert resolve_image(key, folder, images_by_stem(folder)).samefile(tmp_path / "set" / "a.png")
