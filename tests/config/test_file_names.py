"""Names and texts for files are tried before anything rests on them."""

from pathlib import Path

import pytest

from library.config import leftovers
from library.config.errors import UserError
from library.config.file_names import name_problem, require_writable_name, text_problem

_BAD_NAMES = {
    "": "it is empty",
    " ": "it is empty",
    ".": "it means a folder",
    "..": "it means a folder",
    "../x": "'/' separates folders",
    "a/b": "'/' separates folders",
    "a\\b": "'\\' separates folders",
    "a\0b": "character 2 is a control character",
    "a\nb": "character 2 is a control character",
    "\x1b[2J": "character 1 is a control character",
    "a\udcffb": "character 2 is no UTF-8",
    "a\ud800": "character 2 is no UTF-8",
    "C:x": "Windows allows no : in a name",
    "what?": "Windows allows no ? in a name",
    'the "best"': 'Windows allows no " in a name',
    "a|b": "Windows allows no | in a name",
    "a*": "Windows allows no * in a name",
    "a<b": "Windows allows no < in a name",
    "model.": "Windows allows no dot or space at the end of a name",
    "model ": "Windows allows no dot or space at the end of a name",
    "CON": "Windows takes CON for a device",
    "nul.safetensors": "Windows takes nul for a device",
    "Com1": "Windows takes Com1 for a device",
    "LPT9.x": "Windows takes LPT9 for a device",
    "aux .x": "Windows takes aux for a device",
}


@pytest.mark.parametrize(("name", "reason"), _BAD_NAMES.items(), ids=map(ascii, _BAD_NAMES))
def test_a_name_that_some_system_cannot_hold_is_refused_with_the_reason(tmp_path, name, reason):
    assert name_problem(name) == reason
    with pytest.raises(UserError) as refused:
        require_writable_name(tmp_path, name, "--output_name")
    assert reason in str(refused.value)
    assert str(refused.value).startswith("--output_name is '")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["model", "my model ü 猫 🐈", "v1.5", ".hidden", "a'b", "console", "com10", "[x] {y}", "-x"]
)
def test_other_names_are_tried_and_leave_nothing(tmp_path, name):
    assert name_problem(name) is None
    require_writable_name(tmp_path / "output", name, "--output_name", ["-step00000000-state", ".safetensors"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "猫" * 100, "x" * 200])
def test_a_name_that_leaves_no_room_for_what_is_added_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"such files cannot be written in '.*' \(File name too long\)"):
        require_writable_name(tmp_path, name, "--output_name", ["-step00000000-state"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_tried_where_it_stands(tmp_path):
    (tmp_path / "output").write_bytes(b"")
    require_writable_name(tmp_path / "output" / "deeper", "m", "--output_name")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\0b", "character 2 is NUL"),
        ("a\udcff", "character 2 is no UTF-8"),
        ("\ud83d", "character 1 is no UTF-8"),
        ("a cat\n猫 🐈\t", None),
        ("", None),
    ],
    ids=["NUL", "a byte that is no UTF-8", "half of a pair", "text of any script", "empty"],
)
def test_a_text_that_no_file_can_hold_is_told_from_others(text, problem):
    assert text_problem(text) == problem


def test_the_folder_in_which_names_are_tried_is_one_that_the_next_start_removes(tmp_path: Path, monkeypatch):
    rename, seen = Path.rename, []

    def look(self: Path, target: Path) -> Path:
        seen.extend(path.name for path in tmp_path.iterdir())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", look)
    require_writable_name(tmp_path, "m", "--output_name", ("", ".safetensors"))
    assert len(seen) == 2
    assert all(leftovers._proven(name) for name in seen)
    assert not list(tmp_path.iterdir())
