"""Cleaning from the command line: what is shown, written, finished after a kill, and restored to the byte."""

import json

import pytest
from PIL import Image

from finetune import clean_captions_and_tags as script
from finetune import sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.data.metadata import write_metadata
from tests.annotation.conftest import run
from tests.annotation.killed_run import run_and_kill
from tests.reliability.refusal import said_on_refusal

CONTENTS = {
    "a.txt": b"cat, long_hair, style\r\ncat, b\r\n",
    "a.caption": b"\xef\xbb\xbfA woman.\n",
    "b.txt": "cat cat, ünïcode, style".encode(),
    "below/c.txt": b"dog\n",
    "d.txt": b"",
}


@pytest.fixture
def folder(tmp_path):
    """Images with captions whose line ends, marks and spaces a careless writer would change."""
    images = tmp_path / "my set"
    (images / "below").mkdir(parents=True)
    for name, content in CONTENTS.items():
        (images / name).write_bytes(content)
        Image.new("RGB", (8, 8)).save((images / name).with_suffix(".png"))
    return images


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".txt", ".caption")
    }


def clean(folder, *flags):
    return run(script, folder, *flags)


CLEANING = ["--encoder=l", "--find", "cat", "--replace", "cat cat", "--move_tags=style", "--recursive"]
CLEANED = {
    "a.txt": b"cat cat, long_hair\r\ncat cat, b\r\n",
    "a.caption": b"\xef\xbb\xbfA woman., style\n",
    "b.txt": "cat cat cat cat, ünïcode".encode(),
    "b.caption": b"style\n",
    "below/c.txt": b"dog\n",
    "d.txt": b"",
}


def test_a_cleaning_is_written_and_undone_to_the_byte(folder, capsys):
    before = contents(folder)
    assert clean(folder, *CLEANING) == 0
    assert contents(folder) == CLEANED
    printed = capsys.readouterr().out
    assert "       2  replace 'cat' with 'cat cat'\n         2  move style" in printed
    assert "2 of 4 captions change" in printed
    assert clean(folder, "--encoder=g", "--remove_tags=style") == 0
    assert (folder / "b.caption").read_bytes() == b"\n"
    for _ in range(2):
        assert script.main(["--undo", str(folder / "captions-undo.jsonl")]) == 0
    assert contents(folder) == before
    capsys.readouterr()
    assert script.main([f"--undo={folder / 'captions-undo.jsonl'}"]) == 0
    assert "there is nothing to undo" in capsys.readouterr().out


def test_a_dry_run_shows_both_texts_and_writes_nothing(folder, capsys):
    assert clean(folder, *CLEANING, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "a.txt\n  - cat, long_hair, style\n  + cat cat, long_hair\n  - cat, b\n  + cat cat, b\n" in printed
    assert "  - the other encoder: \ufeffA woman.\n".replace("\ufeff", "\\ufeff") in printed
    assert "b.txt\n" in printed and "  + the other encoder: style\n" in printed
    assert "2 of 4 captions would change" in printed
    assert contents(folder) == dict(sorted(CONTENTS.items()))
    assert not (folder / "captions-undo.jsonl").exists()


@pytest.mark.parametrize("at", [2, 3])
def test_a_killed_cleaning_is_finished_by_the_same_command_and_done_once(at, folder):
    run_and_kill("finetune.clean_captions_and_tags", folder, *CLEANING, at=at)
    assert contents(folder) != CLEANED
    assert clean(folder, *CLEANING) == 0
    assert contents(folder) == CLEANED  # "cat" was replaced once, not twice
    assert script.main(["--undo", str(folder / "captions-undo.jsonl")]) == 0
    assert contents(folder) == dict(sorted(CONTENTS.items()))


def test_a_killed_cleaning_can_be_undone_at_once(folder):
    run_and_kill("finetune.clean_captions_and_tags", folder, *CLEANING, at=3)
    assert script.main(["--undo", str(folder / "captions-undo.jsonl")]) == 0
    assert contents(folder) == dict(sorted(CONTENTS.items()))
    assert clean(folder, "--encoder=l", "--remove_tags=b") == 0
    assert (folder / "a.txt").read_bytes() == b"cat, long_hair, style\r\ncat\r\n"


def test_what_somebody_changed_since_stays_when_the_rest_is_restored(folder, capsys):
    assert clean(folder, *CLEANING) == 0
    (folder / "a.txt").write_bytes(b"by hand")
    assert script.main(["--undo", str(folder / "captions-undo.jsonl")]) == 1
    assert "1 captions were changed by somebody else" in (said := capsys.readouterr().err) and "a.txt" in said
    assert contents(folder) == {**dict(sorted(CONTENTS.items())), "a.txt": b"by hand"}


def test_captions_that_a_rule_empties_are_named(folder, capsys):
    assert clean(folder, "--encoder=l", "--recursive", "--find", "dog", "--replace", "") == 0
    assert "1 captions are empty now: 'below/c.txt'" in capsys.readouterr().err


def test_metadata_is_cleaned_like_files_and_undone_to_the_byte(folder, capsys):
    (folder / "b.caption").write_text("b", encoding="utf-8")
    (folder / "d.caption").write_text("d", encoding="utf-8")
    for suffix in ("json", "jsonl"):
        path = folder.parent / f"meta.{suffix}"
        assert sdxl_merge_captions_l_to_metadata.main([str(folder), str(path)]) == 0
        assert sdxl_merge_captions_g_to_metadata.main([str(folder), str(path)]) == 0
        before = path.read_bytes()
        assert clean(path, *CLEANING, "--dry_run") == 0
        assert path.read_bytes() == before
        assert clean(path, *CLEANING) == 0
        text = path.read_text(encoding="utf-8")
        assert '"captionL": "cat cat, long_hair\\ncat cat, b"' in text
        assert '"captionG": "A woman., style"' in text
        assert script.main(["--undo", str(path.with_name(f"{path.name}-undo.jsonl"))]) == 0
        assert path.read_bytes() == before


def test_metadata_of_other_programs_goes_into_another_file(folder, capsys):
    path, out = folder.parent / "meta.json", folder.parent / "clean.json"
    path.write_text('{"a": {"tags": ["cat", "long_hair"], "caption": "A cat"}}', encoding="utf-8")
    said = said_on_refusal(script, [str(path), "--encoder=l", "--remove_tags=cat"], capsys)
    assert "in a form that an undo could not restore" in said
    assert clean(path, "--encoder=l", "--remove_tags=cat", f"--out_json={out}") == 0
    assert json.loads(out.read_text(encoding="utf-8")) == {"a": {"tags": ["long_hair"], "caption": "A cat"}}
    said = said_on_refusal(script, [str(path), "--encoder=l", "--remove_tags=x", f"--out_json={out}"], capsys)
    assert "exists already" in said


def test_a_listed_caption_of_several_lines_goes_into_another_file(folder, capsys):
    path = folder.parent / "meta.json"
    write_metadata(path, {"a": {"captionL": ["cat, dog\ncat", "dog"], "captionG": ["one", "two"]}})
    before = path.read_bytes()
    assert "several lines" in said_on_refusal(script, [str(path), "--encoder=l", "--remove_tags=cat"], capsys)
    assert clean(path, "--encoder=g", "--find", "one", "--replace", "three", f"--out_json={path}.out") == 0
    assert path.read_bytes() == before


BAD_COMMANDS = [
    (["--remove_tags=a"], "--encoder is missing"),
    (["--encoder=l"], "there is nothing to do"),
    (["--encoder=l", "--find", "a"], "--find has 1 texts and --replace 0"),
    (["--encoder=l", "--find", "(", "--replace", "x", "--regex"], "no regular expression"),
    (["--encoder=l", "--sort", "--out_json=x.json"], "--out_json is for metadata"),
    (["--encoder=l", "--sort", "--rules=none.toml"], "cannot read 'none.toml'"),
    (["--undo=none"], "--undo: there is no file 'none'"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_COMMANDS, ids=lambda value: str(value)[:40])
def test_a_mistake_on_the_command_line_is_one_clear_line(flags, said, folder, capsys):
    argv = flags if flags[0].startswith("--undo") else [str(folder), *flags]
    assert said in said_on_refusal(script, argv, capsys)


def test_files_that_cannot_be_read_are_named_and_nothing_is_written(folder, capsys):
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    before = contents(folder)
    assert "a.txt' is not UTF-8" in said_on_refusal(script, [str(folder), *CLEANING], capsys)
    (folder / "captions-undo.jsonl").write_text("nonsense", encoding="utf-8")
    assert script.main([f"--undo={folder / 'captions-undo.jsonl'}"]) == 0
    assert "there is nothing to undo" in capsys.readouterr().out
    assert contents(folder) == before
