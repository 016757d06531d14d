"""Metadata that cannot be used ends every script with status 2, before any model is opened."""

import json
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.config.errors import UserError
from library.data.caption_files import MergeOptionsG, merge_captions
from library.data.metadata import COLUMN_G, read_metadata
from library.sdxl.tokenizers import tokenize_captions
from tests.conftest import base_flags
from tests.reliability.refusal import said_on_refusal

MERGE_SCRIPTS = [sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata]

UNREADABLE = {
    "broken JSON": (b'{"01": {},\n"02": }', "is not valid JSON: line 2, column 7"),
    "cut short": (b'{"01": {"captionL": "a c', "is not valid JSON: line 1"),
    "nothing": (b"", "is not valid JSON: line 1, column 1"),
    "not UTF-8": (b'{"01": {"captionL": "caf\xe9"}}', "is not UTF-8: byte 24 is 0xe9. Save it as UTF-8."),
    "UTF-16": ('{"01": {}}'.encode("utf-16"), "is not UTF-8: byte 0 is 0xff. Save it as UTF-8."),
    "a key twice": (b'{"01": {}, "01": {}}', "the key '01' occurs twice in one object."),
    "a caption twice": (b'{"01": {"captionG": "a", "captionG": "b"}}', "the key 'captionG' occurs twice"),
    "a list": (b"[1, 2]", "expected an object of image keys, got [1, 2]."),
    "an entry of text": (b'{"01": "a cat"}', "image '01': expected an object of captions"),
    "a caption of numbers": (
        b'{"01": {"captionL": 5}}',
        "image '01': expected captionL to be a text or a list of texts, got 5.",
    ),
    "a caption of null": (
        b'{"01": {"captionG": null}}',
        "image '01': expected captionG to be a text or a list of texts, got null.",
    ),
    "a size of text": (b'{"01": {"train_resolution": "1024"}}', "expected train_resolution to be [width, height]"),
    "a bottomless list": (b'{"01": ' + b"[" * 10_000, "is not metadata (maximum recursion depth exceeded"),
    "a bottomless number": (b'{"01": ' + b"9" * 10_000 + b"}", "is not metadata (Exceeds the limit"),
}
UNUSABLE_FOR_TRAINING = {
    "no image": ({}, "'meta.json' has no images."),
    "no caption L": ({"01": {"captionG": ""}}, "1 images have no L caption: 01."),
    "no caption G": ({"01": {"captionL": ""}}, "1 images have no G caption: 01."),
    "a key without picture": ({"02": {"captionL": "", "captionG": ""}}, "are not in 'images': 02."),
    "a key that climbs": ({"../secret.png": {"captionL": "", "captionG": ""}}, "outside the image folder 'images'"),
    "an endless key": ({"a" * 100_000: {"captionL": "", "captionG": ""}}, "1 images of 'meta.json' are not in"),
}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with one picture, a picture that is not for training, and a model that is no model."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Image.new("RGB", (64, 64)).save("secret.png")
    Path("images/01.txt").write_text("", encoding="utf-8")
    Path("images/01.caption").write_text("", encoding="utf-8")
    Path("model.safetensors").write_bytes(b"nothing")
    return tmp_path


TRAIN = base_flags("model.safetensors", "meta.json", "images", "output")


@pytest.mark.parametrize(("content", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_the_trainer_names_the_mistake_before_it_opens_the_model(content: bytes, problem: str, in_folder, capsys):
    Path("meta.json").write_bytes(content)
    assert problem in said_on_refusal(sdxl_train, TRAIN, capsys)


@pytest.mark.parametrize(("content", "problem"), UNUSABLE_FOR_TRAINING.values(), ids=UNUSABLE_FOR_TRAINING)
def test_the_trainer_names_what_cannot_be_trained_before_it_opens_the_model(
    content: dict, problem: str, in_folder, capsys
):
    Path("meta.json").write_text(json.dumps(content), encoding="utf-8")
    assert problem in said_on_refusal(sdxl_train, TRAIN, capsys)


@pytest.mark.parametrize(("content", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_the_preparation_names_the_mistake_before_it_opens_the_vae(content: bytes, problem: str, in_folder, capsys):
    Path("meta.json").write_bytes(content)
    argv = ["images", "meta.json", "out.json", "model.safetensors"]
    assert problem in said_on_refusal(prepare_buckets_latents, argv, capsys)
    assert not Path("out.json").exists()


@pytest.mark.parametrize("script", MERGE_SCRIPTS, ids=["G", "L"])
@pytest.mark.parametrize(("content", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_the_merge_scripts_name_the_mistake_and_leave_the_file(content: bytes, problem: str, script, in_folder, capsys):
    Path("meta.json").write_bytes(content)
    assert problem in said_on_refusal(script, ["images", "meta.json"], capsys)
    assert Path("meta.json").read_bytes() == content


def test_a_caption_of_100000_characters_is_kept_whole_and_cut_to_the_tokens_that_are_read(in_folder):
    caption = "a cat 颐 " * 14_286
    Path("images/01.caption").write_text(caption, encoding="utf-8")
    merge_captions(MergeOptionsG(Path("images"), Path("meta.json")), COLUMN_G)
    stored = read_metadata(Path("meta.json"))["01"]["captionG"]
    assert stored == caption.strip()
    assert len(stored) >= 100_000
    tokens = tokenize_captions([stored], [stored], num_chunks=3)
    assert tokens.tokens_l.shape == tokens.tokens_g.shape == (1, 3, 77)


def test_a_pictures_caption_that_is_a_folder_is_named(in_folder):
    Path("images/01.caption").unlink()
    Path("images/01.caption").mkdir()
    with pytest.raises(UserError, match=r"cannot read 'images.01\.caption'"):
        merge_captions(MergeOptionsG(Path("images"), Path("meta.json")), COLUMN_G)
    assert not Path("meta.json").exists()
