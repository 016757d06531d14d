"""Files are written whole or not at all."""

import pytest

from library.config.atomic_files import replacing, write_text
from library.config.errors import UserError


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_utf8_with_line_ends_as_given(tmp_path):
    path = tmp_path / "captions é.txt"
    write_text(path, "ein Kätzchen\n猫\r\n")
    assert path.read_bytes() == "ein Kätzchen\n猫\r\n".encode()


def test_missing_parent_folders_are_made(tmp_path):
    path = tmp_path / "my set" / "output" / "note.txt"
    write_text(path, "x")
    assert path.read_text(encoding="utf-8") == "x"


def test_an_existing_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("a longer text than the new one", encoding="utf-8")
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert names_in(tmp_path) == ["meta.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_block_leaves_the_old_file_and_no_partial_one(tmp_path, error):
    path = tmp_path / "meta.json"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["meta.json"]


def test_the_old_file_is_there_until_the_block_ends(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_folder_in_the_way_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "meta.json"
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot write '.*meta\.json'"):
        write_text(path, "x")
    assert names_in(tmp_path) == ["meta.json"]


def test_a_file_in_place_of_the_parent_folder_is_an_error_that_names_the_target(tmp_path):
    (tmp_path / "output").write_text("I am a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write '.*note\.txt'"):
        write_text(tmp_path / "output" / "note.txt", "x")
    assert (tmp_path / "output").read_text(encoding="utf-8") == "I am a file"
