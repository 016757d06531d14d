"""The images of a set: found, read, asked about, edited together, and kept up with their files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.captions.limits import count_tokens
from library.captions.rules import CaptionRules, PairRules
from library.config.errors import UserError
from library.data.subsets import Subset
from library.editing.caption_edits import Edit
from library.editing.caption_search import found
from library.editing.caption_set import CaptionSet
from library.editing.caption_writing import undo, write_step
from library.editing.set_edits import planned
from library.editing.undo_journal import UndoJournal
from library.images.buckets import BucketOptions, parse_resolution

CAPTIONS = {  # name: L, G
    "cat 2": ("1girl, cat, red hair", "A cat beside a girl."),
    "cat 10": ("cat, black cat, category", "Two dogs."),
    "dog": ("dog, red", ""),
    "bare": (None, None),
    "broken": ("\xff", "caf\xe9"),
}


def write(folder, captions=CAPTIONS):
    folder.mkdir(parents=True)
    for name, (caption_l, caption_g) in captions.items():
        Image.new("RGB", (100, 60) if name != "dog" else (60, 100)).save(folder / f"{name}.png")
        for ending, caption in ((".txt", caption_l), (".caption", caption_g)):
            if caption is not None:
                (folder / f"{name}{ending}").write_bytes(caption.encode("latin-1"))
    return folder


def subset_of(folder, **settings):
    rule = BucketOptions().rule(parse_resolution("1024"))
    return Subset(image_dir=folder, metadata_file=None, rule=rule, **settings)


def loaded(*subsets):
    opened = CaptionSet(subsets)
    opened.list_images()
    opened.load()
    return opened


@pytest.fixture
def opened(tmp_path):
    rules = PairRules(rules_g=CaptionRules(max_token_length=75))
    return loaded(subset_of(write(tmp_path / "images"), captions=rules))


def names(opened, query, order="name", **settings):
    return [Path(member.name).stem for member in found(opened, query, order, **settings)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["bare", "broken", "cat 2", "cat 10", "dog"]),
        ("l:cat", ["cat 2", "cat 10"]),
        ("l:cat NOT g:cat", ["cat 10"]),
        ("l:cat -g:cat", ["cat 10"]),
        ("NOT (l:cat OR l:dog)", ["bare", "broken"]),
        ("l:[cat]", ["cat 2", "cat 10"]),
        ("l:[black cat]", ["cat 10"]),
        ("l:[red]", ["dog"]),
        ('l:"red hair"', ["cat 2"]),
        ("l:cat*", ["cat 2", "cat 10"]),
        ("l:categ*", ["cat 10"]),
        ("l:CAT AND girl", ["cat 2"]),
        ("both:cat", ["cat 2"]),
        ("dog", ["dog"]),  # the name, and L
        ("no:l", ["bare"]),
        ("no:g", ["bare", "dog"]),
        ("is:error", ["broken"]),
        ("name:10", ["cat 10"]),
        ("bucket:1024x640", ["bare", "broken", "cat 2", "cat 10"]),
        ("over:l", []),
        ("subset:images l:dog", ["dog"]),
        ("subset:elsewhere", []),
    ],
)
def test_questions_are_answered(opened, query, expected):
    assert names(opened, query) == expected


@pytest.mark.parametrize("query", ["l:cat OR", "NOT", "(l:cat", "l:cat)", "x:cat", "no:x", "over:", "is:x"])
def test_what_is_no_question_is_refused_with_what_helps(opened, query):
    with pytest.raises(UserError):
        found(opened, query)


def test_images_are_put_in_order(opened):
    assert names(opened, "", "length_l")[-1] == "cat 2"
    assert names(opened, "", "length_l", descending=True)[0] == "cat 2"
    with pytest.raises(UserError, match="there is no order 'size'"):
        found(opened, "", "size")


def test_what_is_over_the_limit_is_counted_with_the_rules_of_the_subset(tmp_path):
    folder = write(tmp_path / "images", {"a": ("x, " * 40, "short"), "b": ("one", "two")})
    rules = CaptionRules(caption_prefix="a prefix of five words,", max_token_length=75)
    opened = loaded(subset_of(folder, captions=PairRules(rules_l=rules)))
    assert names(opened, "over:l") == ["a"]
    short, longer = (found(opened, f"name:{name}")[0].captions["l"].num_tokens for name in "ba")
    assert short == count_tokens("a prefix of five words, one", rules) > count_tokens("one", rules)
    assert longer > 75


def test_tags_are_counted_in_all_variants(opened):
    counts = opened.tag_counts("l")
    assert counts["cat"] == 2
    assert "" not in counts


def test_changes_by_others_are_taken_in(tmp_path, opened):
    folder, revision = tmp_path / "images", opened.revision
    (folder / "dog.txt").write_text("wolf", encoding="utf-8")
    Image.new("RGB", (50, 50)).save(folder / "new.png")
    (folder / "cat 2.png").unlink()
    paths = [folder / name for name in ("dog.txt", "new.png", "cat 2.png", "unrelated.npz")]
    changed = {Path(member.name).stem for member in opened.refresh(paths)}
    assert changed == {"dog", "new", "cat 2"}
    assert names(opened, "wolf") == ["dog"]
    assert names(opened, "no:l") == ["bare", "new"]
    assert "cat 2" not in names(opened, "")
    assert opened.revision > revision
    assert opened.refresh(paths[:1]) == []


def test_metadata_is_a_set_as_well(tmp_path):
    folder = write(tmp_path / "images")
    path = tmp_path / "meta.json"
    entries = {"cat 2": {"captionL": "one", "captionG": ["a", "b"]}, "dog": {"tags": "x, y", "caption": "text"}}
    path.write_text(json.dumps(entries), encoding="utf-8")
    opened = loaded(replace(subset_of(folder), metadata_file=path))
    assert names(opened, "l:[y]") == ["dog"]
    assert names(opened, "g:b") == ["cat 2"]
    plan = planned(Edit("replace", ("l", "g"), "x", "z", reading="text"), opened.members, opened)
    journal = UndoJournal(tmp_path / "undo.jsonl")
    assert len(write_step(journal, "edit", [each.change for each in plan.changes]).written) == 2
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["dog"] == {"tags": "z, y", "caption": "tezt"}
    undo(journal)
    assert json.loads(path.read_text(encoding="utf-8")) == entries


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            Edit("add", ("l",), "new, cat"),
            {
                "cat 2": "1girl, cat, red hair, new",
                "cat 10": "cat, black cat, category, new",
                "dog": "dog, red, new, cat",
                "bare": "new, cat\n",
            },
        ),
        (
            Edit("add", ("l",), "new", in_front=True),
            {
                "cat 2": "new, 1girl, cat, red hair",
                "cat 10": "new, cat, black cat, category",
                "dog": "new, dog, red",
                "bare": "new\n",
            },
        ),
        (Edit("remove", ("l",), "CAT"), {"cat 2": "1girl, red hair", "cat 10": "black cat, category"}),
        (
            Edit("replace", ("l",), "cat", "black cat"),
            {"cat 2": "1girl, black cat, red hair", "cat 10": "black cat, category"},
        ),
        (
            Edit("replace", ("l",), "red", "blue", reading="text"),
            {"cat 2": "1girl, cat, blue hair", "dog": "dog, blue"},
        ),
        (
            Edit("replace", ("l",), r"(\w+) hair", r"hair of \1", reading="pattern"),
            {"cat 2": "1girl, cat, hair of red"},
        ),
        (Edit("replace", ("l",), "RED", "x", reading="text", matches_case=True), {}),
        (Edit("replace", ("l",), "dog", ""), {"dog": "red"}),
    ],
)
def test_many_captions_are_edited_as_they_should_be(tmp_path, opened, edit, expected):
    plan = planned(edit, opened.members, opened)
    assert {Path(each.member.name).stem: each.change.after.decode() for each in plan.changes} == expected
    assert [member.name for member, _ in plan.left_out] == ["broken.png"]


def test_tags_move_from_one_caption_to_the_other(tmp_path):
    folder = write(tmp_path / "images", {"a": ("cat", "photo, a cat sits, outdoors"), "b": (None, "outdoors\nphoto")})
    opened = loaded(subset_of(folder))
    plan = planned(Edit("move", ("g", "l"), "photo, outdoors"), opened.members, opened)
    after = {(each.member.name[0], each.encoder): each.change.after for each in plan.changes}
    assert after == {
        ("a", "g"): b"a cat sits",
        ("a", "l"): b"cat, photo, outdoors",
        ("b", "g"): b"\n",
        ("b", "l"): b"outdoors, photo\n",
    }


def test_a_plan_has_another_name_when_a_caption_has_changed(tmp_path, opened):
    edit = Edit("add", ("l",), "new")
    plan = planned(edit, opened.members, opened)
    assert planned(edit, opened.members, opened).name == plan.name
    (tmp_path / "images" / "dog.txt").write_text("wolf", encoding="utf-8")
    assert planned(edit, opened.members, opened).name != plan.name


@pytest.mark.parametrize(
    "edit",
    [
        Edit("burn", ("l",), "x"),
        Edit("add", ("l",), " "),
        Edit("add", (), "x"),
        Edit("move", ("l", "l"), "x"),
        Edit("replace", ("l",), "(", reading="pattern"),
        Edit("replace", ("l",), "a", r"\9", reading="pattern"),
    ],
)
def test_an_edit_that_is_none_is_refused(opened, edit):
    with pytest.raises(UserError):
        planned(edit, opened.members, opened)
