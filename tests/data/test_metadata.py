"""The metadata file: what is read, what is refused, what is written, and which image a key means."""

import json
import os
import re
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.data.metadata import (
    caption_g,
    caption_l,
    image_key,
    images_by_stem,
    keys_of_images,
    read_metadata,
    resolve_image,
    train_resolution,
    with_train_resolution,
    write_metadata,
)
from library.sdxl.sizes import Size

GOLDEN = Path(__file__).parent.parent / "golden"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.fixture
def meta(tmp_path):
    """A function that writes bytes or text to the metadata file and gives its path."""

    def write(content):
        path = tmp_path / "my set" / "méta.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Reading


@pytest.mark.parametrize("name", ["meta_cap_after_g.json", "meta_cap.json", "meta_lat_1024_seed_command.json"])
def test_the_files_of_the_seed_are_read_and_come_through_a_rewrite(tmp_path, name):
    metadata = read_metadata(GOLDEN / name)
    assert len(metadata) == 14
    write_metadata(tmp_path / "again.json", metadata)
    assert read_metadata(tmp_path / "again.json") == metadata


def test_the_parts_of_an_entry_have_a_reader_each():
    metadata = read_metadata(GOLDEN / "meta_lat_1024_seed_command.json")
    entry = metadata["02_cat"]
    assert caption_g(entry) == "close-up of a tabby cat looking at the camera, green eyes"
    assert caption_l(entry) == "photographic, pet"
    assert train_resolution(entry) == Size(1216, 832)
    assert caption_l(metadata["14_coffee_small"]) == ""
    assert (caption_g({}), caption_l({}), train_resolution({})) == (None, None, None)


def test_a_bucket_is_added_to_a_copy_of_the_entry():
    entry = {"captionG": "a cat", "tags": ["mine"]}
    prepared = with_train_resolution(entry, Size(1216, 832))
    assert prepared == {"captionG": "a cat", "tags": ["mine"], "train_resolution": [1216, 832]}
    assert "train_resolution" not in entry


def test_a_byte_order_mark_is_accepted(meta):
    assert read_metadata(meta(b'\xef\xbb\xbf{"01": {}}')) == {"01": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n  "01": {},\n  "02" {}\n}', "is not valid JSON: line 3, column 8: "),
        ("", "is not valid JSON: line 1, column 1: "),
        (b'{"01": {"captionG": "caf\xe9"}}', "is not UTF-8: byte 24 is 0xe9. Save it as UTF-8."),
        ('{"01": {}, "01": {}}', ": the key '01' stands twice in one object."),
        ('{"01": {"captionG": "a", "captionG": "b"}}', ": the key 'captionG' stands twice in one object."),
        ("[1, 2]", ": expected an object of image keys, got [1, 2]."),
        ('{"01": "a cat"}', ", image '01': expected an object of captions, got \"a cat\"."),
        ('{"01": {"captionL": 5}}', ", image '01': expected captionL to be text, got 5."),
        ('{"01": {"captionG": null}}', ", image '01': expected captionG to be text, got null."),
    ],
)
def test_a_broken_file_is_refused_with_file_place_and_expectation(meta, content, message):
    path = meta(content)
    with pytest.raises(UserError, match=re.escape(f"'{path}'") + ".?" + re.escape(message)):
        read_metadata(path)


@pytest.mark.parametrize("size", ["[1024]", "[1024, 0]", "[1024, 1024.5]", '"1024,1024"', "[true, 64]", "null"])
def test_a_training_size_is_two_positive_whole_numbers(meta, size):
    with pytest.raises(UserError, match=r"image '01': expected train_resolution to be \[width, height\] in pixels"):
        read_metadata(meta(f'{{"01": {{"train_resolution": {size}}}}}'))


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*gone.json'.*merge scripts"):
        read_metadata(tmp_path / "gone.json")


# Writing


def test_text_of_all_scripts_stays_readable_and_unknown_keys_stay(meta):
    entry = {"captionG": "颐和园 🏯 — ü", "score": 0.5, "nested": {"kept": [1, None]}}
    path = meta("")
    write_metadata(path, {"01": entry})
    assert path.read_text(encoding="utf-8").splitlines()[:3] == ["{", '  "01": {', '    "captionG": "颐和园 🏯 — ü",']
    assert read_metadata(path) == {"01": entry}


def test_half_a_surrogate_pair_survives_as_an_escape(meta):
    path = meta('{"01": {"captionG": "cut \\ud83c"}, "whole": {"captionG": "\\ud83c\\udfef"}}')
    metadata = read_metadata(path)
    write_metadata(path, metadata)
    assert read_metadata(path) == metadata
    assert b"cut \\ud83c" in path.read_bytes()
    assert "🏯" in path.read_text(encoding="utf-8")


# Keys


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
    with pytest.raises(UserError, match="the key 'a' could mean") as error:
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


def test_what_is_written_is_plain_json_of_indent_two(tmp_path):
    metadata = json.loads((GOLDEN / "meta_cap.json").read_text(encoding="utf-8"))
    write_metadata(tmp_path / "meta.json", metadata)
    lines = (tmp_path / "meta.json").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ['  "01_astronaut": {', '    "captionG": "' + metadata["01_astronaut"]["captionG"] + '",']
