"""What a search of metadata has found is remembered, and looked for again after any change that matters."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.captions.rules import CaptionRules, PairRules
from library.data import metadata_images
from library.data.image_columns import FoundImages
from library.data.latent_index import read_index
from library.data.metadata_images import find_images_of_metadata
from library.data.subsets import Subset
from library.images.buckets import BucketRule
from library.sdxl.sizes import Size
from tests.data.test_single_reads import counting_reads

RULE = BucketRule(Size(64, 64), 64, 64, 32, no_upscale=False)
NAMES = ("a", "b", "c")


class Set:
    """Prepared images by their names: a search reads none of the files."""

    def __init__(self, folder: Path):
        self.folder = folder / "images"
        self.folder.mkdir()
        self.metadata = folder / "meta.json"
        self.subset = Subset(self.folder, self.metadata, RULE, prior_loss_weight=0.5)
        for name in NAMES:
            for suffix in (".png", ".npz"):
                (self.folder / f"{name}{suffix}").write_bytes(b"")
            (self.folder / f"{name}.txt").write_text(f"style {name}", encoding="utf-8")
            os.utime(self.folder / f"{name}.txt", (1e9, 1e9))
        self.write({name: {"captionL": f"style {name}", "captionG": [f"{name} é", "other"]} for name in NAMES})

    def write(self, entries: dict) -> None:
        full = {name: {**entry, "train_resolution": [64, 64]} for name, entry in entries.items()}
        self.metadata.write_text(json.dumps(full), encoding="utf-8")
        os.utime(self.metadata, (1.5e9, 1.5e9))

    def find(self, subset: Subset | None = None) -> FoundImages:
        return find_images_of_metadata(subset or self.subset, True, is_kept=True)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Set:
    monkeypatch.setattr(metadata_images, "FEWEST_IMAGES", 1)
    return Set(tmp_path)


@pytest.fixture
def searches(monkeypatch) -> list[Subset]:
    """The subsets that were searched."""
    found: list[Subset] = []
    search = metadata_images.MetadataSearch

    def counted(subset: Subset) -> metadata_images.MetadataSearch:
        found.append(subset)
        return search(subset)

    monkeypatch.setattr(metadata_images, "MetadataSearch", counted)
    return found


def test_the_second_start_finds_the_same_without_a_search(folder, searches, caplog):
    caplog.set_level(logging.INFO)
    (folder.folder / "unused.png").write_bytes(b"")
    entries = {name: {"captionL": f"style {name}", "caption": f"woman {name}"} for name in NAMES}
    folder.write(entries | {"c": {"captionL": "c", "captionG": ["1", "2"], "is_reg": True, "loss_weight": 2}})
    (folder.folder / "c.txt").write_text("c", encoding="utf-8")
    os.utime(folder.folder / "c.txt", (1e9, 1e9))
    first, said = list(folder.find()), caplog.messages[:]
    caplog.clear()
    again = list(folder.find())
    assert again == first
    assert caplog.messages == said
    assert any("unused.png" in message for message in said)
    assert len(searches) == 1
    assert first[2].subset.is_reg
    assert first[2].loss_weight == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.write({name: {"captionL": "new", "captionG": "new"} for name in NAMES}),
        lambda one: (one.folder / "a.png").rename(one.folder / "a.jpg"),
        lambda one: (one.folder / "new.png").write_bytes(b""),
        lambda one: (one.folder / "a.txt").write_text("edited", encoding="utf-8"),
        lambda one: (one.folder / "a.txt").unlink(),
        lambda one: (one.folder / "a.caption").write_text("written since", encoding="utf-8"),
        lambda one: os.utime(one.metadata, (1e9 - 5, 1e9 - 5)),
    ],
    ids=[
        "metadata",
        "renamed image",
        "new image",
        "edited caption",
        "removed caption",
        "new caption",
        "time of the metadata",
    ],
)
def test_a_change_is_searched_for(folder, searches, change):
    folder.find()
    change(folder)
    found = list(folder.find())
    assert len(searches) == 2
    assert found == list(find_images_of_metadata(folder.subset, True))


def test_what_the_program_keeps_among_the_images_is_no_change(folder, searches):
    folder.metadata = folder.metadata.rename(folder.folder / "meta.json")
    inside = replace(folder.subset, metadata_file=folder.metadata)
    folder.find(inside)
    (folder.folder / "meta.json.index" / "names-1.npy").write_bytes(b"")
    assert list(folder.find(inside)) == list(find_images_of_metadata(inside, True))
    assert len(searches) == 1


def test_what_is_remembered_is_not_taken_for_a_damaged_index(folder, caplog):
    folder.find()
    assert not len(read_index(folder.metadata.with_name("meta.json.index")).names)
    assert caplog.text == ""


def test_a_check_of_all_searches_again(folder, searches):
    folder.find()
    assert list(find_images_of_metadata(folder.subset, True, uses_last=False)) == list(folder.find())
    assert len(searches) == 2


def test_a_set_of_few_images_and_a_start_that_is_not_a_training_keep_nothing(folder, monkeypatch):
    find_images_of_metadata(folder.subset, True)
    monkeypatch.setattr(metadata_images, "FEWEST_IMAGES", 100)
    with counting_reads() as reads:
        folder.find()
    assert reads[str(folder.metadata)] == 1
    assert not folder.metadata.with_name("meta.json.index").exists()


def test_rules_of_captions_are_no_reason_to_search_again(folder, searches):
    folder.find()
    rules = PairRules(CaptionRules(shuffle_caption=True), CaptionRules(keep_tokens=2))
    other = replace(folder.subset, captions=rules, num_repeats=3, batch_size=2)
    assert {id(image.subset) for image in folder.find(other)} == {id(other)}
    assert len(searches) == 1


def test_searches_with_many_settings_do_not_fill_the_disk(folder):
    for number in range(12):
        folder.find(replace(folder.subset, loss_weight=1.0 + number))
    assert len(list(folder.metadata.with_name("meta.json.index").iterdir())) == 8


def test_other_settings_are_searched_for(folder, searches):
    folder.find()
    other = Subset(folder.folder, folder.metadata, RULE, loss_weight=3.0)
    assert set(folder.find(other).loss_weights) == {3}
    assert len(searches) == 2


def test_a_damaged_memory_is_reported_and_made_again(folder, searches, caplog):
    folder.find()
    (path,) = folder.metadata.with_name("meta.json.index").glob("found-*.safetensors")
    whole = path.read_bytes()
    at = whole.index(b"style")
    path.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    assert [image.captions.variants_l for image in folder.find()] == [(f"style {name}",) for name in NAMES]
    assert "cannot be used" in caplog.text
    path.write_bytes(whole[: len(whole) // 2])
    folder.find()
    assert len(searches) == 3
    folder.find()
    assert len(searches) == 3


def test_what_warns_is_said_at_every_start(folder, searches, caplog):
    (folder.folder / "a.txt").write_text("edited", encoding="utf-8")
    for _ in range(2):
        caplog.clear()
        folder.find()
        assert "1 caption files have changed" in caplog.text
    assert len(searches) == 2


def test_columns_are_those_of_the_search(folder):
    first, again = folder.find(), folder.find()
    for name in ("subset_of", "buckets", "sizes", "loss_weights", "in_shards"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert (again.keys, again.files, again.caches) == (first.keys, first.files, first.caches)
