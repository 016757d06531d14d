"""Caption files that have changed since they were merged: what is named, and what `update_captions` takes over."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from finetune import sdxl_merge_captions_g_to_metadata as merge_g
from finetune import sdxl_merge_captions_l_to_metadata as merge_l
from library.captions.final_captions import CaptionPair
from library.config.errors import UserError
from library.data.caption_sources import CaptionSource, update_captions
from library.data.metadata import read_metadata, write_metadata
from library.data.subsets import Subset
from library.data.training_set import find_training_images
from library.images.keys import images_by_stem, resolve_image
from tests.data.conftest import TrainingFolder
from tests.data.test_single_reads import counting_reads

FAR_FUTURE = 4_000_000_000


@dataclass
class CaptionedFolder:
    """Images with a caption file for each encoder, and the metadata of them."""

    path: Path
    metadata: Path

    def add(self, name, caption_l="l", caption_g="g"):
        image = self.path / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(image)
        for suffix, caption in ((".txt", caption_l), (".caption", caption_g)):
            if caption is not None:
                image.with_suffix(suffix).write_text(caption, encoding="utf-8")
        return image

    def merge(self, *flags):
        for script in (merge_g, merge_l):
            assert script.main([str(self.path), str(self.metadata), *flags]) == 0

    def start(self):
        """What is found at the start of training."""
        return find_training_images([Subset(self.path, self.metadata, TrainingFolder.rule)])

    def update(self):
        update_captions(self.metadata, self.path)

    def captions(self):
        return {key: (entry["captionL"], entry["captionG"]) for key, entry in read_metadata(self.metadata).items()}


@pytest.fixture
def captioned(tmp_path, capsys):
    """Three images, merged; what the merge scripts print is forgotten."""
    made = CaptionedFolder(tmp_path / "my set ü" / "my images", tmp_path / "my set ü" / "meta.json")
    for name in ("a.png", "b.v2.png", "deep/c.png"):
        made.add(name)
    made.merge("--recursive")
    capsys.readouterr()
    return made


def edit(image, suffix, text):
    """Write a caption file so that its time is another one however coarse the clock is."""
    path = image.with_suffix(suffix)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (FAR_FUTURE, FAR_FUTURE))
    return path


# What is named


def test_nothing_is_said_and_no_caption_file_is_read_while_none_has_changed(captioned, capsys):
    with counting_reads() as reads:
        captioned.start()
    assert not any(path.endswith((".txt", ".caption")) for path in reads)
    assert capsys.readouterr() == ("", "")


def test_changed_files_are_named_and_the_old_captions_are_found(captioned, capsys):
    one = edit(captioned.path / "b.v2.png", ".txt", "new")
    two = edit(captioned.path / "deep/c.png", ".caption", "h")  # of the same size
    found = captioned.start()
    assert {image.captions for image in found} == {CaptionPair(("l",), ("g",))}
    assert capsys.readouterr().err.strip() == (
        f"2 caption files have changed since they were merged into '{captioned.metadata}', and their old captions are "
        f"trained: '{one}', '{two}'. --update_captions takes the new ones over."
    )


def test_ten_changed_files_are_named_and_all_are_counted(captioned, capsys):
    images = [captioned.add(f"{number:02}.png") for number in range(20)]
    captioned.merge("--recursive")
    for image in images:
        edit(image, ".txt", "new")
    captioned.start()
    said = capsys.readouterr().err
    assert "20 caption files have changed" in said
    assert said.count(".txt'") == 10
    assert "and 10 more." in said


@pytest.mark.parametrize("text", ["l", "\ufeff  l \r\n"])
def test_space_line_ends_and_dates_are_no_change(captioned, capsys, text):
    edit(captioned.path / "a.png", ".txt", text)
    captioned.start()
    assert capsys.readouterr().err == ""


def test_a_copy_without_its_dates_has_not_changed(captioned, capsys, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(captioned.path, copy / "images", copy_function=shutil.copyfile)
    shutil.copyfile(captioned.metadata, copy / "meta.json")
    for path in copy.rglob("*.txt"):
        os.utime(path, (FAR_FUTURE, FAR_FUTURE))
    CaptionedFolder(copy / "images", copy / "meta.json").start()
    assert capsys.readouterr().err == ""


def test_captions_that_were_edited_in_the_metadata_are_no_change_of_a_file(captioned, capsys):
    metadata = read_metadata(captioned.metadata)
    metadata["a"]["captionL"] = "cleaned"
    write_metadata(captioned.metadata, metadata)
    captioned.start()
    captioned.update()
    assert capsys.readouterr().err == ""
    assert captioned.captions()["a"] == ("cleaned", "g")


def test_files_that_are_gone_or_of_another_suffix_are_not_compared(captioned, capsys):
    (captioned.path / "a.txt").unlink()
    (captioned.path / "b.v2.caption").unlink()
    (captioned.path / "b.v2.caption").mkdir()
    edit(captioned.path / "deep/c.png", ".tags", "new")
    captioned.start()
    assert capsys.readouterr().err == ""


def test_the_recorded_suffix_is_compared(captioned, capsys):
    image = captioned.path / "a.png"
    edit(image, ".my tags", "l")
    for path in (captioned.path / "b.v2.png", captioned.path / "deep/c.png"):
        edit(path, ".my tags", "l")
    argv = [captioned.path, captioned.metadata, "--recursive", "--caption_extension=.my tags"]
    assert merge_l.main(list(map(str, argv))) == 0
    capsys.readouterr()
    edit(image, ".txt", "new")
    captioned.start()
    assert capsys.readouterr().err == ""
    edit(image, ".my tags", "new")
    captioned.start()
    assert "1 caption files have changed" in capsys.readouterr().err


def without_records(captioned):
    metadata = read_metadata(captioned.metadata)
    bare = {
        key: {name: value for name, value in entry.items() if not name.endswith("_source")}
        for key, entry in metadata.items()
    }
    write_metadata(captioned.metadata, bare)


def test_without_a_record_files_later_than_the_metadata_are_compared(captioned, capsys):
    without_records(captioned)
    edit(captioned.path / "a.png", ".txt", "l")  # the same text, later
    older = captioned.path / "b.v2.txt"
    older.write_text("other tags, which the metadata has cleaned", encoding="utf-8")
    os.utime(older, (1, 1))
    captioned.start()
    assert capsys.readouterr().err == ""
    changed = edit(captioned.path / "deep/c.png", ".txt", "new")
    captioned.start()
    assert f"1 caption files have changed since they were merged into '{captioned.metadata}'" in capsys.readouterr().err
    captioned.update()
    assert captioned.captions() == {"a": ("l", "g"), "b.v2": ("l", "g"), "c": ("new", "g")}
    assert CaptionSource.parse(read_metadata(captioned.metadata)["c"]["captionL_source"]).size == changed.stat().st_size


def test_tags_and_captions_of_sd_scripts_are_compared_too(captioned, capsys):
    entries = {key: {"tags": "l", "caption": "g"} for key in captioned.captions()}
    write_metadata(captioned.metadata, entries)
    captioned.start()
    assert capsys.readouterr().err == ""
    edit(captioned.path / "a.png", ".txt", "new")
    captioned.start()
    assert "1 caption files have changed" in capsys.readouterr().err
    captioned.update()
    entry = read_metadata(captioned.metadata)["a"]
    assert (entry["tags"], entry["captionL"], entry["caption"]) == ("l", "new", "g")


@pytest.mark.parametrize("text", [5, "", ".txt 1 2", ".txt x 1 ab", ".txt 1 ² ab", None])
def test_what_is_no_record_is_none(text):
    assert CaptionSource.parse(text) is None


def test_a_record_is_read_as_it_was_written():
    source = CaptionSource(".my tags", 8, 9, "ab")
    assert CaptionSource.parse(str(source)) == source


def test_a_file_that_cannot_be_read_counts_as_changed_and_stops_the_update(captioned, capsys):
    path = edit(captioned.path / "a.png", ".txt", "")
    path.write_bytes(b"caf\xe9")
    captioned.start()
    assert f"1 caption files have changed since they were merged into '{captioned.metadata}'" in capsys.readouterr().err
    before = captioned.metadata.read_bytes()
    with pytest.raises(UserError, match=r"a.txt' is not UTF-8"):
        captioned.update()
    assert captioned.metadata.read_bytes() == before


# What is taken over


def test_an_update_takes_changed_captions_and_leaves_the_rest(captioned, capsys):
    metadata = read_metadata(captioned.metadata)
    metadata["a"] |= {"score": 1, "train_resolution": [64, 64]}
    write_metadata(captioned.metadata, metadata)
    changed = edit(captioned.path / "a.png", ".txt", "new\nlines 🏯")
    captioned.update()
    assert capsys.readouterr().out.strip() == (
        f"captions: 1 changed files are taken over into '{captioned.metadata}': '{changed}'"
    )
    updated = read_metadata(captioned.metadata)
    assert updated["a"]["captionL"] == "new\nlines 🏯"
    del updated["a"]["captionL"], updated["a"]["captionL_source"]
    del metadata["a"]["captionL"], metadata["a"]["captionL_source"]
    assert updated == metadata
    captioned.start()
    assert capsys.readouterr().err == ""


def test_without_changes_the_metadata_is_not_written(captioned, capsys):
    captioned.metadata.write_text(json.dumps(read_metadata(captioned.metadata)), encoding="utf-8")
    before = captioned.metadata.read_bytes()
    captioned.update()
    assert captioned.metadata.read_bytes() == before
    assert f"no caption file has changed since it was merged into '{captioned.metadata}'" in capsys.readouterr().out


def test_after_an_update_new_dates_are_known_and_files_are_not_read(captioned):
    edit(captioned.path / "a.png", ".txt", "l")
    captioned.update()
    with counting_reads() as reads:
        captioned.start()
    assert not any(path.endswith((".txt", ".caption")) for path in reads)


def test_new_images_beside_the_others_are_added(captioned, capsys):
    captioned.add("d.png", "l of d", "g of d")
    captioned.add("deep/e.png")
    captioned.add("f.png", caption_g=None)  # not captioned yet
    captioned.add("rejected/h.png")  # a folder without images of the metadata
    captioned.update()
    assert captioned.captions() == {
        **dict.fromkeys(("a", "b.v2", "c"), ("l", "g")),
        "d": ("l of d", "g of d"),
        "e": ("l", "g"),
    }
    assert f"captions: 2 new images are added to '{captioned.metadata}': d, e" in capsys.readouterr().out
    assert [image.key for image in captioned.start()] == ["a", "b.v2", "c", "d", "e"]
    assert capsys.readouterr().err == ""


def test_a_new_image_with_the_key_of_another_one_is_named(captioned, capsys):
    shadowed = captioned.add("deep/a.png")
    captioned.update()
    assert f"1 new images have the key of another one and are left out: '{shadowed}'" in capsys.readouterr().err
    assert list(captioned.captions()) == ["a", "b.v2", "c"]


@pytest.mark.parametrize("style", ["full paths", "lines"])
def test_keys_of_new_images_are_like_the_others(captioned, style):
    captioned.metadata.unlink()
    if style == "lines":
        captioned.metadata = captioned.metadata.with_suffix(".jsonl")
        write_metadata(captioned.metadata, {"a.png": {"captionL": "", "captionG": ""}})
        captioned.merge("--recursive")
        expected = ["a.png", "b.v2.png", "deep/c.png", "deep/a.png"]
    else:
        captioned.merge("--recursive", "--full_path")
        expected = [str(captioned.path / name) for name in ("a.png", "b.v2.png", "deep/c.png", "deep/a.png")]
    new = captioned.add("deep/a.png")
    captioned.update()
    assert list(captioned.captions()) == expected
    assert resolve_image(expected[-1], captioned.path, images_by_stem(captioned.path)) == new


def test_missing_captions_are_read_by_an_update(captioned):
    metadata = read_metadata(captioned.metadata)
    for name in ("captionL", "captionL_source"):
        del metadata["a"][name]
    write_metadata(captioned.metadata, metadata)
    with pytest.raises(UserError, match=r"1 images have no L caption: a.*--update_captions"):
        captioned.start()
    edit(captioned.path / "a.png", ".txt", "there")
    captioned.update()
    assert captioned.captions()["a"] == ("there", "g")
