"""What killed writers left is removed; nothing of anybody else ever is, whatever its name."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.config import leftovers
from library.config.atomic_files import replacing, replacing_folder, write_text
from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX, discard_replaced, remove_leftovers, temporary_path


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def as_another_process(monkeypatch):
    """`as_another_process(path, suffix)`: the temporary name that a process made which runs no more."""

    def name(path, suffix=PARTIAL_SUFFIX):
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: ended.pid)
            return temporary_path(path, suffix)

    return name


# What is not ours


_NOT_OURS = [
    "holiday film.2024.partial",
    "report.1999.replaced",
    "model.safetensors.4711.partial",
    "01.npz.partial",
    "01.npz.replaced",
    "a.12-abcdef01-0123456789abcdef.partial",
    "a.12-abcdef01-0123456789abcdef.replaced",
    ".1-00000000-0000000000000000.partial",
]


@pytest.mark.parametrize("name", _NOT_OURS)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_only_looks_like_a_leftover_stays(tmp_path, name, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "picture.jpg").write_bytes(b"mine")
    path = tmp_path / "images" / name
    path.parent.mkdir()
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
        (path / "picture.jpg").write_bytes(b"mine")
    else:
        path.symlink_to(elsewhere, target_is_directory=True)
    before = names_in(tmp_path)
    assert remove_leftovers(path.parent) == []
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("suffix", [PARTIAL_SUFFIX, REPLACED_SUFFIX])
@pytest.mark.parametrize("change", ["renamed", "another number", "another kind"])
def test_a_name_of_ours_that_somebody_changed_proves_nothing(tmp_path, suffix, change, as_another_process):
    path = as_another_process(tmp_path / "01.npz", suffix)
    name, _, rest = path.name.partition(".npz.")
    changed = {
        "renamed": f"02.npz.{rest}",
        "another number": f"{name}.npz.1{rest}",
        "another kind": path.name.replace(suffix, {PARTIAL_SUFFIX: REPLACED_SUFFIX}.get(suffix, PARTIAL_SUFFIX)),
    }[change]
    (tmp_path / changed).write_bytes(b"mine")
    (tmp_path / "01.npz").write_bytes(b"old")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / changed).read_bytes() == b"mine"


def test_leftovers_of_an_earlier_version_are_named_once_and_stay(tmp_path, caplog):
    for number in range(12):
        (tmp_path / f"{number:02}.npz.4711.partial").write_bytes(b"")
    (tmp_path / "film.partial").write_bytes(b"")
    assert remove_leftovers(tmp_path, tmp_path) == []
    [said] = caplog.messages
    assert "'09.npz.4711.partial' and 2 more may be leftovers of an earlier version" in said
    assert len(names_in(tmp_path)) == 13


def test_folders_below_are_left_alone(tmp_path, as_another_process):
    below = tmp_path / "sub"
    below.mkdir()
    as_another_process(below / "01.npz").write_bytes(b"")
    assert remove_leftovers(tmp_path) == []


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    assert remove_leftovers(tmp_path / "not yet") == []


# What is ours


@pytest.mark.parametrize("name", ["01.npz", "a b ü.png", "x" * 250, "猫" * 80, "m-state", "a.1-b"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed(tmp_path, name, kind, as_another_process, caplog):
    path = as_another_process(tmp_path / name)
    if kind == "file":
        path.write_bytes(b"half")
    else:
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"half")
    assert remove_leftovers(tmp_path) == [path]
    assert names_in(tmp_path) == []
    assert "removed 1 unfinished files" in caplog.text


def test_a_writer_that_was_really_killed_leaves_what_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from library.config.atomic_files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os._exit(9)"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors")], cwd=root, check=False)
    assert ended.returncode == 9
    assert len(names_in(tmp_path)) == 1
    assert len(remove_leftovers(tmp_path)) == 1
    assert names_in(tmp_path) == []


def test_what_is_still_being_written_stays(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: writer.pid)
            path = temporary_path(tmp_path / "m.safetensors", PARTIAL_SUFFIX)
        time.sleep(0.05)  # a file is younger than the process that writes it
        path.write_bytes(b"half")
        assert remove_leftovers(tmp_path) == []
        writer.communicate(b"\n")
    assert remove_leftovers(tmp_path) == [path]


def test_what_another_machine_writes_stays_for_a_day(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "_host", lambda: "abcdef01")
        path = temporary_path(tmp_path / "m.safetensors", PARTIAL_SUFFIX)
    path.write_bytes(b"half")
    assert remove_leftovers(tmp_path) == []
    two_days_ago = time.time() - 2 * 86400
    os.utime(path, (two_days_ago, two_days_ago))
    assert remove_leftovers(tmp_path) == [path]


def test_a_folder_whose_successor_is_not_in_place_is_put_back(tmp_path, as_another_process):
    aside = as_another_process(tmp_path / "m-state", REPLACED_SUFFIX)
    aside.mkdir()
    (aside / "progress.json").write_bytes(b"old")
    assert remove_leftovers(tmp_path) == []
    assert names_in(tmp_path) == ["m-state", "m-state/progress.json"]


def test_a_folder_whose_successor_is_in_place_goes(tmp_path, as_another_process):
    aside = as_another_process(tmp_path / "m-state", REPLACED_SUFFIX)
    for folder in (aside, tmp_path / "m-state"):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_bytes(folder.name.encode())
    assert remove_leftovers(tmp_path) == [aside]
    assert names_in(tmp_path) == ["m-state", "m-state/unet", "m-state/unet/weights"]


# Folders that are replaced


def replaced_and_new(tmp_path):
    old, new = tmp_path / "old", tmp_path / "m"
    for folder in (old, new):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_bytes(b"w")
        (folder / "model_index.json").write_bytes(b"{}")
    return old, new


@pytest.mark.parametrize("extra", ["notes.txt", "unet/notes.txt", "samples/best/01.png"])
def test_what_somebody_added_to_a_folder_is_kept_when_it_is_replaced(tmp_path, extra, caplog):
    old, new = replaced_and_new(tmp_path)
    (old / extra).parent.mkdir(parents=True, exist_ok=True)
    (old / extra).write_bytes(b"mine")
    (tmp_path / "m (replaced 1)").mkdir()
    discard_replaced(old, new)
    assert (tmp_path / "m (replaced 2)" / extra).read_bytes() == b"mine"
    assert len([path for path in (tmp_path / "m (replaced 2)").rglob("*") if path.is_file()]) == 1
    assert not old.exists()
    assert f"{extra} are now in '{tmp_path / 'm (replaced 2)'}'" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_in_a_replaced_folder_are_not_followed(tmp_path):
    old, new = replaced_and_new(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "picture.jpg").write_bytes(b"mine")
    (old / "vae").symlink_to(elsewhere, target_is_directory=True)
    (new / "vae").mkdir()
    discard_replaced(old, new)
    assert not old.exists()
    assert (elsewhere / "picture.jpg").read_bytes() == b"mine"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_in_the_place_of_a_model_is_replaced_and_what_it_led_to_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model_index.json").write_bytes(b"{}")
    (tmp_path / "m").symlink_to(elsewhere, target_is_directory=True)
    with replacing_folder(tmp_path / "m", marker="model_index.json") as folder:
        write_text(folder / "model_index.json", "new")
    assert (tmp_path / "m" / "model_index.json").read_bytes() == b"new"
    assert (elsewhere / "model_index.json").read_bytes() == b"{}"
    assert names_in(tmp_path) == ["elsewhere", "elsewhere/model_index.json", "m", "m/model_index.json"]


def test_a_replaced_folder_keeps_what_the_new_one_lacks(tmp_path):
    model = tmp_path / "m"
    with replacing_folder(model, marker="model_index.json") as folder:
        write_text(folder / "model_index.json", "old")
    (model / "notes.txt").write_bytes(b"mine")
    with replacing_folder(model, marker="model_index.json") as folder:
        write_text(folder / "model_index.json", "new")
    assert (model / "model_index.json").read_bytes() == b"new"
    assert names_in(tmp_path / "m (replaced 1)") == ["notes.txt"]


def test_a_very_long_name_is_written_and_read(tmp_path):
    path = tmp_path / ("x" * 251 + ".npz")
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == [path.name]
