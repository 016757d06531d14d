"""The two merge scripts: from caption files to metadata, and every mistake that must leave the metadata as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune import sdxl_merge_captions_g_to_metadata as merge_g
from finetune import sdxl_merge_captions_l_to_metadata as merge_l
from library.config.digests import digest

REPOSITORY = Path(__file__).parent.parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
BOTH = pytest.mark.parametrize("script", [merge_g, merge_l], ids=["G", "L"])
EXTENSIONS = {merge_g: ".caption", merge_l: ".txt"}
KEYS = {merge_g: "captionG", merge_l: "captionL"}


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def content_of(path):
    """The entries without the records of the files that their captions are from."""
    metadata = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: {name: value for name, value in entry.items() if not name.endswith("_source")}
        for key, entry in metadata.items()
    }


def add_image(folder, name, **captions):
    """A picture, and a caption file for each suffix in `captions`: text or bytes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    for suffix, caption in captions.items():
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(f".{suffix}").write_bytes(data)
    return path


@pytest.fixture
def folder(tmp_path):
    """An image folder whose name a shell and a Windows code page would stumble over."""
    path = tmp_path / "my set ü 颐" / "images"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def existing(folder):
    """A metadata file that a mistake must leave as it is, byte for byte."""
    path = folder.parent / "meta cap.json"
    path.write_bytes(b'{ "old": {"captionG":"kept",   "score": 1} }')
    return path


def assert_refused(script, arguments, existing, capsys, *messages):
    before = existing.read_bytes()
    status = script.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in printed
    for message in messages:
        assert message in printed
    assert existing.read_bytes() == before
    assert [path.name for path in existing.parent.iterdir() if path.suffix == ".partial"] == []


# What is written


def test_both_scripts_one_after_the_other_give_the_metadata_of_the_reference(folder, capsys):
    for key, entry in golden("meta_cap.json").items():
        add_image(folder, f"{key}.png", caption=f"{entry['captionG']}\n", txt=entry["captionL"])
    out = folder.parent / "meta_cap.json"
    assert merge_g.main([str(folder), str(out)]) == 0
    assert content_of(out) == golden("meta_cap_after_g.json")
    assert merge_l.main([str(folder), str(out)]) == 0
    assert content_of(out) == golden("meta_cap.json")
    assert capsys.readouterr().out.splitlines() == [
        f"Wrote 14 entries to '{out}': captionG of 14 images, 0 of them empty",
        f"Wrote 14 entries to '{out}': captionL of 14 images, 1 of them empty",
    ]


@BOTH
def test_space_around_a_caption_and_a_byte_order_mark_go_and_lines_inside_stay(script, folder):
    suffix = EXTENSIONS[script].removeprefix(".")
    add_image(folder, "01.JPG", **{suffix: b"\xef\xbb\xbf \t first\r\nsecond \xf0\x9f\x8f\xaf \r\n\r\n"})
    add_image(folder, "02.jpg", **{suffix: b"\xef\xbb\xbf\r\n"})
    assert script.main([str(folder), str(folder / "meta.json")]) == 0
    assert content_of(folder / "meta.json") == {"01": {KEYS[script]: "first\nsecond 🏯"}, "02": {KEYS[script]: ""}}


@BOTH
def test_what_an_existing_output_holds_is_kept_and_the_caption_is_renewed(script, folder):
    out = folder.parent / "meta.json"
    kept = {"old": {"captionG": "g", "captionL": "l"}, "01": {"captionG": "g", "captionL": "l", "score": [1]}}
    out.write_text(json.dumps(kept), encoding="utf-8")
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "new"})
    assert script.main([str(folder), str(out)]) == 0
    assert content_of(out) == {"old": kept["old"], "01": kept["01"] | {KEYS[script]: "new"}}


@BOTH
def test_captions_that_were_edited_in_the_metadata_are_named_when_their_files_replace_them(script, folder, capsys):
    out, key = folder.parent / "meta.json", KEYS[script]
    for name in ("edited", "same", "file"):
        add_image(folder, f"{name}.png", **{EXTENSIONS[script][1:]: "before"})
    assert script.main([str(folder), str(out)]) == 0
    metadata = json.loads(out.read_text(encoding="utf-8"))
    metadata["edited"][key] = ["mine", "another"]
    out.write_text(json.dumps(metadata), encoding="utf-8")
    add_image(folder, "file.png", **{EXTENSIONS[script][1:]: "after"})
    assert script.main([str(folder), str(out)]) == 0
    said = "".join(capsys.readouterr())
    assert (
        f"1 {key[-1]} captions were edited in the metadata and are replaced by those of their files: 'edited'" in said
    )
    assert content_of(out)["file"] == {key: "after"}


@BOTH
def test_in_json_is_extended_in_place_of_the_existing_output_and_that_is_said(script, folder, existing, capsys):
    other = folder.parent / "other.json"
    other.write_text('{"other": {}}', encoding="utf-8")
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "new"})
    assert script.main([str(folder), str(existing), "--in_json", str(other)]) == 0
    assert content_of(existing) == {"other": {}, "01": {KEYS[script]: "new"}}
    assert content_of(other) == {"other": {}}
    assert f"'{existing}' is replaced by '{other}' with these captions" in "".join(capsys.readouterr())


@BOTH
def test_subfolders_and_paths_as_keys_on_request(script, folder):
    suffix = EXTENSIONS[script][1:]
    images = [add_image(folder, name, **{suffix: name}) for name in ("a.png", "deep/a.png")]
    out = folder.parent / "meta.json"
    assert script.main([str(folder), str(out), "--recursive", "--full_path"]) == 0
    assert content_of(out) == {
        str(images[0]): {KEYS[script]: "a.png"},
        str(images[1]): {KEYS[script]: "deep/a.png"},
    }


@BOTH
@pytest.mark.parametrize("flag", ["--caption_extension", "--caption_extention"])
def test_another_caption_extension_is_read_in_both_spellings(script, folder, flag):
    add_image(folder, "01.png", tags="from tags", txt="wrong", caption="wrong")
    out = folder.parent / "meta.json"
    assert script.main([str(folder), str(out), f"{flag}=.tags"]) == 0
    assert content_of(out) == {"01": {KEYS[script]: "from tags"}}


def test_debug_prints_each_image_with_its_caption_in_place_of_the_bar(folder, capsys):
    image = add_image(folder, "01.png", caption="a cat 🏯")
    assert merge_g.main([str(folder), str(folder / "meta.json"), "--debug"]) == 0
    printed = capsys.readouterr()
    assert f"{image}: a cat 🏯" in printed.out
    assert printed.err == ""


def test_allow_missing_writes_the_rest_and_names_what_it_left_out(folder, existing, capsys):
    add_image(folder, "01.png", caption="a cat")
    missing = [add_image(folder, name) for name in ("02.png", "03.png")]
    assert merge_g.main([str(folder), str(existing), "--allow_missing"]) == 0
    assert set(content_of(existing)) == {"old", "01"}
    assert f"Left out 2 images without .caption: '{missing[0]}', '{missing[1]}'" in capsys.readouterr().out


@BOTH
def test_entries_of_images_that_are_gone_are_removed_on_request(script, folder, existing, capsys):
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "a cat"})
    assert script.main([str(folder), str(existing), "--remove_missing"]) == 0
    assert set(content_of(existing)) == {"01"}
    assert "Removed 1 entries whose image is gone: 'old'" in capsys.readouterr().out


def test_an_image_without_a_caption_is_not_gone(folder, existing):
    add_image(folder, "old.png")
    add_image(folder, "01.png", caption="a cat")
    assert merge_g.main([str(folder), str(existing), "--remove_missing", "--allow_missing"]) == 0
    assert set(content_of(existing)) == {"old", "01"}


def test_images_with_a_caption_for_one_encoder_only_are_named_once_others_have_both(folder, capsys):
    metadata = folder / "meta.json"
    add_image(folder, "01.png", caption="a cat", txt="photo")
    add_image(folder, "02.png", caption="a dog")
    assert merge_g.main([str(folder), str(metadata)]) == 0
    assert "refuses" not in capsys.readouterr().out  # nothing has an L caption yet
    assert merge_l.main([str(folder), str(metadata), "--allow_missing"]) == 0
    assert "1 entries have no captionL; sdxl_train.py refuses such: '02'" in capsys.readouterr().out


def test_jsonl_is_extended_under_its_own_paths(folder):
    out = folder.parent / "meta.jsonl"
    images = [add_image(folder, name, txt=name) for name in ("01.png", "deep/01.png", "02.png")]
    out.write_text(f'{{"image_path": "01.png", "captionG": "a"}}\n{{"image_path": {json.dumps(str(images[1]))}}}\n')
    assert merge_l.main([str(folder), str(out), "--recursive"]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    sizes = [line.pop("captionL_source").split()[1] for line in written]
    assert sizes == ["6", "11", "6"]
    assert written == [
        {"image_path": "01.png", "captionG": "a", "captionL": "01.png"},
        {"image_path": str(images[1]), "captionL": "deep/01.png"},
        {"image_path": "02.png", "captionL": "02.png"},
    ]


def test_the_file_of_each_caption_is_recorded(folder):
    image = add_image(folder, "01.png", txt=" a cat \n", caption="b")
    out = folder.parent / "meta.json"
    assert merge_l.main([str(folder), str(out)]) == 0
    assert merge_g.main([str(folder), str(out)]) == 0
    state = image.with_suffix(".txt").stat()
    assert json.loads(out.read_text(encoding="utf-8"))["01"] == {
        "captionL": "a cat",
        "captionL_source": f".txt 8 {state.st_mtime_ns} {digest([b'a cat'], 8).hex()}",
        "captionG": "b",
        "captionG_source": f".caption 1 {image.with_suffix('.caption').stat().st_mtime_ns} {digest([b'b'], 8).hex()}",
    }


# What is refused


@BOTH
def test_images_without_caption_are_named_and_counted_with_the_remedy(script, folder, existing, capsys):
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "a cat"})
    missing = [add_image(folder, f"{number:02}.png") for number in range(2, 30)]
    shown = [*map(str, missing[:10]), "and 18 more"]
    messages = [f"28 of 29 images have no {EXTENSIONS[script]} file", "--allow_missing", *shown]
    assert_refused(script, [folder, existing], existing, capsys, *messages)


def test_not_a_single_caption_is_a_mistake_even_if_some_may_miss(folder, existing, capsys):
    image = add_image(folder, "01.png", txt="the wrong extension")
    message = f"1 of 1 images have no .caption file: '{image}'"
    assert_refused(merge_g, [folder, existing, "--allow_missing"], existing, capsys, message, "--caption_extension")


@BOTH
@pytest.mark.parametrize(
    ("names", "flags", "remedy"),
    [
        (("a.jpg", "a.png"), [], "rename it together with its caption files"),
        (("x/a.png", "y/a.png"), ["--recursive"], "--full_path"),
    ],
    ids=["suffix", "folder"],
)
def test_two_images_of_one_key_are_both_named(script, folder, existing, capsys, names, flags, remedy):
    suffix = EXTENSIONS[script][1:]
    images = [add_image(folder, name, **{suffix: "a cat"}) for name in names]
    message = f"'{images[0]}' and '{images[1]}' have the same key 'a'"
    assert_refused(script, [folder, existing, *flags], existing, capsys, message, remedy)


@BOTH
def test_a_caption_that_is_not_utf_8_is_named_with_the_byte(script, folder, existing, capsys):
    image = add_image(folder, "01.png", **{EXTENSIONS[script][1:]: b"caf\xe9"})
    caption_file = image.with_suffix(EXTENSIONS[script])
    message = f"'{caption_file}' is not UTF-8: byte 3 is 0xe9. Save it as UTF-8."
    assert_refused(script, [folder, existing], existing, capsys, message)


@BOTH
def test_an_empty_folder_and_a_missing_one_are_named(script, folder, existing, capsys):
    assert_refused(script, [folder, existing], existing, capsys, f"no images in '{folder}'")
    gone = folder / "gone"
    assert_refused(script, [gone, existing], existing, capsys, f"cannot read the image folder '{gone}'")


@BOTH
@pytest.mark.parametrize("flag", [[], ["--in_json"]], ids=["output", "in_json"])
def test_broken_json_is_named_with_its_line_and_left_alone(script, folder, existing, capsys, flag):
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "a cat"})
    broken = folder.parent / "broken.json" if flag else existing
    broken.write_bytes(b'{"01": {},\n"02": }')
    arguments = [folder, existing, *flag, broken][: 4 if flag else 2]
    assert_refused(script, arguments, existing, capsys, f"'{broken}' is not valid JSON: line 2")


@BOTH
def test_a_target_that_cannot_be_written_is_named(script, folder, existing, capsys):
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "a cat"})
    in_the_way = folder.parent / "a folder"
    in_the_way.mkdir()
    (in_the_way / "precious").write_bytes(b"")
    arguments = [folder, in_the_way, "--in_json", existing]
    assert_refused(script, arguments, existing, capsys, f"cannot write '{in_the_way}'")
    below_a_file = existing / "meta.json"
    assert_refused(script, [folder, below_a_file], existing, capsys, f"cannot write '{below_a_file}'")
    assert [path.name for path in in_the_way.iterdir()] == ["precious"]


# As a process


@pytest.mark.parametrize("script", [merge_g, merge_l], ids=["G", "L"])
def test_the_script_runs_from_any_folder_and_reports_a_mistake_by_its_status(script, folder):
    add_image(folder, "01.png", **{EXTENSIONS[script][1:]: "a cat 🏯"})
    command = [sys.executable, script.__file__, "images", "meta.json"]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, content_of(folder.parent / "meta.json")) == (0, {"01": {KEYS[script]: "a cat 🏯"}})
    command[2] = "no such folder"
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the image folder 'no such folder'")


def test_merging_never_imports_torch(folder):
    # Its import takes longer than all the rest; a new process, as other tests have imported it into this one.
    add_image(folder, "01.png", caption="a cat")
    program = (
        "import sys; from finetune import sdxl_merge_captions_g_to_metadata as script;"
        "status = script.main(sys.argv[1:]); sys.exit(status or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(folder), str(folder / "meta.json")]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0
