"""Metadata of one JSON object a line: what is read, what is refused, what is written."""

import re
from functools import partial
from pathlib import Path

import pytest

from library.captions.final_captions import CaptionPair
from library.config.errors import UserError
from library.data.metadata import captions_of, read_metadata, write_metadata
from library.data.metadata_lines import read_lines


@pytest.fixture
def lines(write_metadata_file):
    """A function that writes bytes or text to the metadata file and returns its path."""
    return partial(write_metadata_file, "méta.JSONL")


def test_each_line_is_an_image_with_the_path_as_its_key(lines):
    metadata = read_metadata(
        lines(
            '\ufeff{"image_path": "01.jpg", "captionL": "l", "captionG": ["a", "b"], "score": 1}\r\n'
            "\n"
            '{"caption": "a cat 🏯", "tags": "animal", "image_size": [8, 9], "image_path": "C:\\\\cats\\\\02.jpg"}'
        )
    )
    assert list(metadata) == ["01.jpg", "C:\\cats\\02.jpg"]
    assert metadata["01.jpg"] == {"captionL": "l", "captionG": ["a", "b"], "score": 1}
    assert captions_of(metadata["C:\\cats\\02.jpg"]) == CaptionPair(("animal",), ("a cat 🏯",))


def test_lines_are_read_one_after_the_other(lines):
    reading = read_lines(lines('{"image_path": "01.jpg"}\n{"image_path": "02.jpg"}\nbroken'))
    assert [next(reading), next(reading)] == [(1, "01.jpg", {}), (2, "02.jpg", {})]
    with pytest.raises(UserError, match="line 3, column 1"):
        next(reading)


GOOD = b'{"image_path": "01.jpg"}\n'


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"image_path" "x"}', " is not valid JSON: line 2, column 15: "),
        (b'{"image_path": "x"', " is not valid JSON: line 2, column 19: "),
        (b'{"image_path": "caf\xe9"}', " is not UTF-8: byte 19 of line 2 is 0xe9. Save it as UTF-8."),
        (b"[1]", ", line 2: expected an object with 'image_path', got [1]."),
        (b"{}", ", line 2: expected 'image_path' to name the image, got null."),
        (b'{"image_path": ""}', ", line 2: expected 'image_path' to name the image, got \"\"."),
        (b'{"image_path": "01.jpg"}', ", line 2: an earlier line has the same image path '01.jpg'."),
        (b'{"image_path": "x", "tags": "a", "tags": "b"}', ", line 2: the key 'tags' occurs twice in one object."),
        (b'{"image_path": "x", "captionL": 5}', ", line 2: expected captionL to be a text or a list of texts, got 5."),
        (b'{"image_path": "x", "image_size": 8}', ", line 2: expected image_size to be [width, height] in pixels"),
        (b'{"image_path": ' + b"[" * 10_000, ", line 2 is not metadata (maximum recursion depth exceeded"),
    ],
)
def test_a_broken_line_is_named(lines, second, message):
    path = lines(GOOD + second + b"\n")
    with pytest.raises(UserError, match=re.escape(f"'{path}'{message}")):
        read_metadata(path)


def test_a_byte_behind_a_byte_order_mark_is_named(lines):
    with pytest.raises(UserError, match="byte 22 of line 1 is 0xe9"):
        read_metadata(lines(b'\xef\xbb\xbf{"image_path": "caf\xe9"}\n'))


def test_a_file_of_the_other_form_is_answered_with_the_suffix(lines, tmp_path):
    with pytest.raises(UserError, match=r"line 1, column 2.*let its name end in \.json"):
        read_metadata(lines('{\n  "01": {}\n}'))
    (tmp_path / "meta.json").write_bytes(GOOD + GOOD)
    with pytest.raises(UserError, match=r"line 2, column 1.*one object a line ends in \.jsonl"):
        read_metadata(tmp_path / "meta.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*gone.jsonl': No such file"):
        read_metadata(tmp_path / "gone.jsonl")


def test_what_is_written_is_read_again_and_is_one_line_for_each_image(tmp_path):
    metadata = {
        "01.jpg": {"captionG": "颐和园 🏯\nü", "captionL": ["a", "cut \ud83c"], "nested": {"kept": [1, None]}},
        "02": {"image_path": "another key of the same name", "train_resolution": [64, 128]},
    }
    path = tmp_path / "out.jsonl"
    write_metadata(path, metadata)
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith('{"image_path": "01.jpg", "captionG": ')
    assert second == '{"image_path": "02", "train_resolution": [64, 128]}'
    del metadata["02"]["image_path"]
    assert read_metadata(path) == metadata
    metadata["01.jpg"]["captionL"] = "a"
    write_metadata(path, metadata)
    assert "颐和园 🏯" in path.read_text(encoding="utf-8")
    assert [each.name for each in Path(tmp_path).iterdir()] == ["out.jsonl"]
