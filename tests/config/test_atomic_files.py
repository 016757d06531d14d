"""Files are written whole or not at all."""

import errno

import pytest

from library.config import atomic_files
from library.config.atomic_files import CannotWrite, replacing, replacing_folder, write_text
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


# Whether it is worth while to try again


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\ud800b"], ids=["too long", "NUL", "no UTF-8"])
def test_a_name_that_cannot_be_is_no_reason_to_try_again(tmp_path, name):
    with pytest.raises(CannotWrite, match="cannot write") as refused:
        write_text(tmp_path / name, "x")
    assert not refused.value.is_temporary
    assert names_in(tmp_path) == []


def test_a_text_that_cannot_be_is_no_reason_to_try_again(tmp_path):
    with pytest.raises(CannotWrite, match="character 3 of its text is half of one") as refused:
        write_text(tmp_path / "captions.json", "a \ud83d")
    assert not refused.value.is_temporary
    assert names_in(tmp_path) == []


def test_something_in_the_way_is_no_reason_to_try_again(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(CannotWrite) as refused:
            write_text(path, "x")
        assert not refused.value.is_temporary
    with pytest.raises(CannotWrite) as refused, replacing_folder(tmp_path / "folder", marker="model_index.json"):
        pass
    assert not refused.value.is_temporary


@pytest.mark.parametrize(
    ("number", "is_temporary", "remedy"),
    [
        (errno.ENOSPC, True, "Free some space"),
        (errno.EIO, True, "Check that the folder is there, and its disk."),
        (errno.EAGAIN, True, ""),
        (errno.EBUSY, True, ""),
        (errno.ENOMEM, True, ""),
        (errno.ENAMETOOLONG, False, "Choose a shorter name."),
        (errno.EACCES, False, "where you may write"),
        (errno.EROFS, False, "where you may write"),
        (errno.EINVAL, False, "this disk cannot hold it"),
        (errno.EFBIG, False, "FAT32"),
        (errno.ENOSYS, False, ""),
    ],
    ids=lambda value: errno.errorcode.get(value) if type(value) is int else None,
)
@pytest.mark.parametrize("what", ["a file", "a folder", "a file in a folder"])
def test_an_error_of_the_system_is_told_from_a_passing_one(tmp_path, what, number, is_temporary, remedy):
    def refuse():
        raise OSError(number, "the system's words")

    with pytest.raises(CannotWrite) as refused:
        if what == "a file":
            with replacing(tmp_path / "m.safetensors"):
                refuse()
        elif what == "a folder":
            with replacing_folder(tmp_path / "m-state", marker="progress.json"):
                refuse()
        else:
            folder = replacing_folder(tmp_path / "m-state", marker="progress.json")
            with folder as unfinished, replacing(unfinished / "optimizer.pt"):
                refuse()
    assert refused.value.is_temporary == is_temporary
    assert remedy in refused.value.remedy
    assert "the system's words" in refused.value.problem
    assert names_in(tmp_path) == []


def test_a_file_that_another_program_has_open_on_windows_is_worth_another_try(tmp_path, monkeypatch):
    refusal = atomic_files._refusal
    error = PermissionError(errno.EACCES, "Access is denied")
    assert not refusal("'x'", error).is_temporary
    monkeypatch.setattr(atomic_files.os, "name", "nt")
    assert refusal("'x'", error).is_temporary
