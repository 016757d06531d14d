"""The metadata file: what is read, what is refused and what is written."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from library.captions.final_captions import CaptionPair
from library.config.errors import UserError
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    captions_of,
    is_reg,
    keys_without_caption,
    loss_weight,
    read_metadata,
    require_captions,
    sources_of,
    train_resolution,
    with_train_resolution,
    write_metadata,
)
from library.data.metadata_search import sentence_of_sources
from library.sdxl.sizes import Size

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def meta(write_metadata_file):
    """A function that writes bytes or text to the metadata file and returns its path."""
    return partial(write_metadata_file, "méta.json")


# Reading


@pytest.mark.parametrize("name", ["meta_cap_after_g.json", "meta_cap.json", "meta_lat_1024_seed_command.json"])
def test_the_files_of_the_seed_are_read_and_come_through_a_rewrite(tmp_path, name):
    metadata = read_metadata(GOLDEN / name)
    assert len(metadata) == 14
    write_metadata(tmp_path / "again.json", metadata)
    assert read_metadata(tmp_path / "again.json") == metadata


def test_the_parts_of_an_entry_have_a_reader_each():
    metadata = read_metadata(GOLDEN / "meta_lat_1024_seed_command.json")
    assert captions_of(metadata["02_cat"]) == CaptionPair(
        ("photographic, pet",), ("close-up of a tabby cat looking at the camera, green eyes",)
    )
    assert train_resolution(metadata["02_cat"]) == Size(1216, 832)
    assert captions_of(metadata["14_coffee_small"]).variants_l == ("",)
    assert train_resolution({}) is None
    assert (loss_weight({}), loss_weight({"loss_weight": 2})) == (1.0, 2.0)
    assert (is_reg({}), is_reg({"is_reg": True})) == (False, True)


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
        ('{"01": {"captionL": 5}}', ", image '01': expected captionL to be a text or a list of texts, got 5."),
        ('{"01": {"captionL": []}}', ", image '01': expected captionL to be a text or a list of texts, got []."),
        (
            '{"01": {"captionL": ["a", 5]}}',
            ", image '01': expected captionL to be a text or a list of texts, got [\"a\", 5].",
        ),
        ('{"01": {"captionG": null}}', ", image '01': expected captionG to be a text or a list of texts, got null."),
        ('{"01": {"is_reg": 1}}', ", image '01': expected is_reg to be true or false, got 1."),
        ('{"01": {"image_size": [1024]}}', ", image '01': expected image_size to be [width, height] in pixels, got"),
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


@pytest.mark.parametrize("weight", ["-1", "NaN", "Infinity", '"1"', "true", "null", "9" * 400])
def test_a_loss_weight_is_a_finite_number_of_0_or_more(meta, weight):
    with pytest.raises(UserError, match=r"image '01': expected loss_weight to be a number from 0 to 1000, got"):
        read_metadata(meta(f'{{"01": {{"loss_weight": {weight}}}}}'))


@pytest.mark.parametrize("weight", ["0", "0.5", "3"])
def test_loss_weights_are_read(meta, weight):
    metadata = read_metadata(meta(f'{{"01": {{"loss_weight": {weight}, "is_reg": true, "image_size": [8, 9]}}}}'))
    assert loss_weight(metadata["01"]) == float(weight)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*gone.json'.*merge scripts"):
        read_metadata(tmp_path / "gone.json")


# Captions


@pytest.mark.parametrize(
    ("entry", "variants_l", "variants_g"),
    [
        ({"captionL": "a\nb", "captionG": ["c", "d"]}, ("a", "b"), ("c", "d")),
        ({"captionL": ["a\nb", "c"], "captionG": "d\r\n\r\ne\r\n"}, ("a", "b", "c"), ("d", "e")),
        ({"captionL": "\n", "captionG": ["", "a"]}, ("",), ("a",)),
        ({"captionL": " kept ", "captionG": ""}, (" kept ",), ("",)),
        ({"tags": "1girl, solo", "caption": "a girl"}, ("1girl, solo",), ("a girl",)),
        ({"tags": ["1girl", "solo"], "caption": ["a girl", "one girl"]}, ("1girl, solo",), ("a girl", "one girl")),
        ({"captionL": "", "tags": "1girl", "captionG": "a", "caption": "b"}, ("",), ("a",)),
        ({"captionL": "l", "tags": "1girl", "caption": "b"}, ("l",), ("b",)),
    ],
)
def test_captions_of_both_encoders_their_variants_and_what_stands_in_for_them(entry, variants_l, variants_g):
    assert captions_of(entry) == CaptionPair(variants_l, variants_g)


@pytest.mark.parametrize(
    ("entry", "text"),  # the texts that sd-scripts trains, but for the last four, where tags would get lost
    [
        ({"caption": "a girl", "tags": "1girl, solo", "captionL": "not read"}, "a girl,1girl, solo"),
        ({"caption": "a girl"}, "a girl"),
        ({"caption": "a girl", "tags": ""}, "a girl"),
        ({"tags": "1girl"}, "1girl"),
        ({"caption": "", "tags": "1girl"}, "1girl"),
        ({"caption": None, "tags": "1girl"}, "1girl"),
        ({"caption": "a girl", "tags": None}, "a girl"),
        ({"caption": "a girl\none girl", "tags": "1girl"}, "a girl,1girl\none girl,1girl"),
        ({"caption": "a girl", "tags": "1girl\nsolo"}, "a girl,1girl,solo"),
        ({"caption": "a girl\n", "tags": "1girl\n"}, "a girl,1girl"),
        ({"caption": " \n", "tags": "1girl"}, "1girl"),
    ],
)
def test_one_caption_for_both_is_caption_and_tags(entry, text):
    variants = tuple(text.split("\n"))
    assert captions_of(entry, one_caption=True) == CaptionPair(variants, variants)


def test_one_caption_is_joined_by_the_separator_of_each_encoder():
    entry = {"caption": "a girl", "tags": "1girl|solo"}
    joined = captions_of(entry, one_caption=True, separators=("|", ","))
    assert joined == CaptionPair(("a girl|1girl|solo",), ("a girl,1girl|solo",))


@pytest.mark.parametrize("entry", [{}, {"tags": {"1girl": 0.9}, "caption": 5}, {"tags": None}, {"caption": [1]}])
def test_what_is_no_caption_counts_as_missing(entry, tmp_path):
    for column in (COLUMN_L, COLUMN_G):
        assert keys_without_caption({"01": entry}, column) == ["01"]
        assert keys_without_caption({"01": entry}, column, one_caption=True) == ["01"]
    with pytest.raises(KeyError):  # which is not an empty caption
        captions_of(entry)
    with pytest.raises(KeyError):
        captions_of(entry, one_caption=True)
    with pytest.raises(UserError, match="1 images have neither 'caption' nor 'tags': 01"):
        require_captions({"01": entry}, tmp_path, one_caption=True)


def test_a_missing_caption_is_named_with_what_could_take_its_place(tmp_path):
    with pytest.raises(UserError, match=r"1 images have no L caption: 01.*--one_caption trains 'caption' and 'tags'"):
        require_captions({"01": {"caption": "a girl"}, "02": {"captionL": "", "captionG": ""}}, tmp_path)
    with pytest.raises(UserError) as caught:
        require_captions({"01": {"captionL": "a girl"}}, tmp_path)
    assert "--one_caption" not in str(caught.value)


def said_of(metadata, **how):
    return sentence_of_sources(Counter(sources_of(entry, **how) for entry in metadata.values()), **how)


def test_the_sources_of_captions_are_counted():
    own, kohya = {"captionL": "", "captionG": ""}, {"caption": "a", "tags": "b"}
    assert said_of({"1": own}) is None
    assert said_of({"1": kohya, "2": kohya}) == "2 images: L from 'tags', G from 'caption'"
    mixed = {"1": own, "2": kohya, "3": kohya, "4": {"captionG": "a", "tags": "b"}}
    assert said_of(mixed) == (
        "2 images: L from 'tags', G from 'caption'; 1 images: L from 'captionL', G from 'captionG'; "
        "1 images: L from 'tags', G from 'captionG'"
    )
    assert said_of({"1": kohya, "2": {"tags": "b"}}, one_caption=True) == (
        "1 images: L and G from 'caption' and 'tags'; 1 images: L and G from 'tags'"
    )


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
