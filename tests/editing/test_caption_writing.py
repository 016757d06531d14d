"""Captions change only where they are what was seen, are written down before, and come back byte for byte."""

import errno
import json
import os
from pathlib import Path

import pytest

from library.config.atomic_files import CannotWrite
from library.config.errors import UserError
from library.editing import caption_places, undo_journal
from library.editing.caption_places import ABSENT, Place, read_place, tag_of
from library.editing.caption_writing import redo, undo, write_step
from library.editing.undo_journal import Change, UndoJournal


@pytest.fixture
def journal(tmp_path):
    return UndoJournal(tmp_path / "state" / "undo.jsonl")


def changed(path, after):
    place = Place(path)
    return Change(place, read_place(place), after)


def test_a_step_over_many_files_is_undone_and_redone_byte_for_byte(tmp_path, journal):
    contents = {
        tmp_path / f"{n}.txt": bytes([0xEF, 0xBB, 0xBF]) + f"tag {n}\r\n\xff".encode("latin-1") for n in range(9)
    }
    for path, content in contents.items():
        path.write_bytes(content)
    missing = tmp_path / "new.txt"
    outcome = write_step(journal, "replace", [*(changed(path, b"x") for path in contents), changed(missing, b"y")])
    assert (len(outcome.written), outcome.conflicts, outcome.failed) == (10, [], [])
    assert missing.read_bytes() == b"y"

    journal = UndoJournal(journal.path)  # after a restart
    assert undo(journal).what == "replace"
    assert {path: path.read_bytes() for path in contents} == contents
    assert not missing.exists()
    assert undo(journal) is None

    assert len(redo(UndoJournal(journal.path)).written) == 10
    assert {path.read_bytes() for path in contents} == {b"x"}
    assert redo(journal) is None


def test_what_somebody_else_has_changed_is_never_overwritten(tmp_path, journal):
    mine, theirs = tmp_path / "mine.txt", tmp_path / "theirs.txt"
    changes = [changed(mine, b"1"), changed(theirs, b"1")]
    theirs.write_bytes(b"of another program")
    outcome = write_step(journal, "both", changes)
    assert [each.place.path for each in outcome.written] == [mine]
    assert outcome.conflicts == [Place(theirs)]
    mine.write_bytes(b"and later")
    assert undo(journal).conflicts == [Place(mine)]
    assert mine.read_bytes() == b"and later"


def test_a_step_of_conflicts_alone_is_not_written_down(tmp_path, journal):
    write_step(journal, "nothing", [Change(Place(tmp_path / "a.txt"), b"not there", b"x")])
    assert journal.to_undo() == []


def test_steps_of_one_group_are_undone_together(tmp_path, journal):
    path = tmp_path / "a.txt"
    for text, group in ((b"0", "before"), (b"1", "typing"), (b"12", "typing"), (b"123", "typing")):
        write_step(journal, "edit", [changed(path, text)], group)
    undo(journal)
    assert path.read_bytes() == b"0"
    redo(journal)
    assert path.read_bytes() == b"123"
    undo(journal)
    write_step(journal, "another", [changed(path, b"else")])
    assert journal.to_redo() == []
    undo(journal)
    undo(journal)
    assert not path.exists()


def test_a_line_that_was_cut_short_is_ignored_and_replaced(tmp_path, journal):
    path = tmp_path / "a.txt"
    write_step(journal, "first", [changed(path, b"1")])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[: len(whole) // 2])
    journal = UndoJournal(journal.path)
    assert [step.what for step in journal.steps()] == ["first"]
    write_step(journal, "second", [changed(path, b"2")])
    assert [step.what for step in UndoJournal(journal.path).steps()] == ["first", "second"]


def test_a_crash_before_the_captions_are_written_leaves_a_step_that_can_be_undone(tmp_path, journal):
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    two.write_bytes(b"old")
    changes = [changed(one, b"new"), changed(two, b"new")]
    journal.record("half done", changes)
    one.write_bytes(b"new")  # and then the power failed
    outcome = undo(UndoJournal(journal.path))
    assert (len(outcome.written), outcome.conflicts) == (2, [])
    assert not one.exists()
    assert two.read_bytes() == b"old"


def test_a_full_disk_of_the_journal_changes_nothing(tmp_path, journal, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    write_step(journal, "before", [changed(path, b"older")])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(undo_journal.os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"No space left on device\. Nothing was changed"):
        write_step(journal, "edit", [changed(path, b"new")])
    monkeypatch.undo()
    assert path.read_bytes() == b"older"
    assert [step.what for step in UndoJournal(journal.path).steps()] == ["before"]


def test_a_full_disk_of_the_captions_leaves_the_step_to_be_undone(tmp_path, journal, monkeypatch):
    paths = [tmp_path / f"{n}.txt" for n in range(3)]
    for path in paths:
        path.write_bytes(b"old")
    write_file = caption_places.replacing

    def full_for_the_last(path):
        if path == paths[-1]:
            raise CannotWrite("cannot write: No space left on device.", "Free some space.", is_temporary=True)
        return write_file(path)

    monkeypatch.setattr(caption_places, "replacing", full_for_the_last)
    outcome = write_step(journal, "edit", [changed(path, b"new") for path in paths])
    assert (len(outcome.written), [place.path for place, _ in outcome.failed]) == (2, paths[-1:])
    assert len(undo(journal).written) == 3
    assert {path.read_bytes() for path in paths} == {b"old"}


def test_a_folder_that_is_gone_is_not_made_again(tmp_path, journal):
    path = tmp_path / "gone" / "a.txt"
    outcome = write_step(journal, "edit", [Change(Place(path), None, b"new")])
    assert "is gone" in outcome.failed[0][1]
    assert not path.parent.exists()


def test_captions_of_metadata_change_in_one_write(tmp_path, journal):
    path = tmp_path / "meta.json"
    entries = {"a": {"captionL": "one", "captionG": ["first", "second"], "mine": 1}, "b": {"tags": ["x", "y"]}}
    path.write_text(json.dumps(entries), encoding="utf-8")
    places = [Place(path, "a", "captionG"), Place(path, "b", "captionL"), Place(path, "b", "tags")]
    assert [read_place(place) for place in places] == [b"first\nsecond", None, b"x, y"]
    changes = [
        Change(place, read_place(place), after) for place, after in zip(places, (b"1\n2", b"new", b"x"), strict=True)
    ]
    assert len(write_step(journal, "edit", changes).written) == 3
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == {
        "a": {"captionL": "one", "captionG": ["1", "2"], "mine": 1},
        "b": {"captionL": "new", "tags": "x"},
    }
    undo(journal)
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == entries["a"]
    assert [read_place(place) for place in places] == [b"first\nsecond", None, b"x, y"]


def test_a_very_long_journal_keeps_its_last_steps(tmp_path, journal, monkeypatch):
    path = tmp_path / "a.txt"
    for number in range(20):
        write_step(journal, f"step {number}", [changed(path, b"%d" % number)])
    line = journal.path.stat().st_size // 20
    monkeypatch.setattr(undo_journal, "_LARGEST_JOURNAL", 10 * line)
    monkeypatch.setattr(undo_journal, "_KEPT_OF_IT", 4 * line)
    journal = UndoJournal(journal.path)
    assert journal.steps()[-1].what == "step 19"
    assert 2 <= len(journal.steps()) <= 5
    undo(journal)
    assert path.read_bytes() == b"18"


def test_a_very_long_journal_whose_last_step_is_undone_keeps_those_before_it(tmp_path, journal, monkeypatch):
    path = tmp_path / "a.txt"
    for number in range(20):
        write_step(journal, f"step {number}", [changed(path, b"%d" % number)])
    undo(journal)
    line = journal.path.stat().st_size // 20
    monkeypatch.setattr(undo_journal, "_LARGEST_JOURNAL", 10 * line)
    monkeypatch.setattr(undo_journal, "_KEPT_OF_IT", 4 * line)
    journal = UndoJournal(journal.path)
    assert journal.steps()[-1].what == "step 18"
    undo(journal)
    assert path.read_bytes() == b"17"


def test_what_is_no_caption_is_refused(tmp_path):
    large = tmp_path / "a.txt"
    large.write_bytes(b"x" * (caption_places.LARGEST_CAPTION + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_place(Place(large))
    with pytest.raises(UserError, match="cannot read"):
        read_place(Place(Path(tmp_path)))
    assert tag_of(read_place(Place(tmp_path / "b.txt"))) == ABSENT
