"""The metadata file: what is read, what is refused and what is written."""

import json
import re
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.data.metadata import (
    caption_g,
    caption_l,
    read_metadata,
    train_resolution,
    with_train_resolution,
    write_metadata,
)
from library.sdxl.sizes import Size

GOLDEN = Path(__file__).parent.parent / "golden"


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
    assert train_resolution({}) is None
    for caption_of in (caption_g, caption_l):
        with pytest.raises(KeyError):  # which is not an empty caption
            caption_of({})


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
        ('{"01": {}, "01": {}}', ": the key '01' occurs twice in one object."),
        ('{"01": {"captionG": "a", "captionG": "b"}}', ": the key 'captionG' occurs twice in one object."),
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


def test_what_is_written_is_plain_json_of_indent_two(tmp_path):
    metadata = json.loads((GOLDEN / "meta_cap.json").read_text(encoding="utf-8"))
    write_metadata(tmp_path / "meta.json", metadata)
    lines = (tmp_path / "meta.json").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ['  "01_astronaut": {', '    "captionG": "' + metadata["01_astronaut"]["captionG"] + '",']
