"""The image files of a folder: which count, and that none that looks like an image is left out in silence."""

import logging
import os
import re

import pytest
from PIL import Image

from library.config.errors import UserError
from library.images import kinds
from library.images.files import find_images, has_images, list_files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names_of(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.fixture
def no_packages(monkeypatch):
    """Without the optional packages for more formats."""
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    missing = {name: ("no_such_module", package) for name, (_, package) in kinds._PACKAGES.items()}
    monkeypatch.setattr(kinds, "_PACKAGES", missing)
    kinds.readable_formats.cache_clear()
    yield
    kinds.readable_formats.cache_clear()


def test_images_are_found_by_suffix_in_any_case_and_sorted(tmp_path):
    expected = ["a.jpg", "b.PNG", "c.JPEG", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF", "i.avif", "j.jfif", "k.jpe"]
    expected += ["l.jp2", "m.qoi", "n.PGM", "o.apng", "p.mpo", "ü ö.Jpg"]
    touch(tmp_path, *reversed(expected))
    touch(tmp_path, "a.txt", "a.caption", "a.npz", "a.jpg.partial", "noext")
    assert names_of(find_images(tmp_path, recursive=False), tmp_path) == expected


def test_subfolders_count_only_when_asked_and_hidden_names_never(tmp_path):
    touch(tmp_path, "a.png", ".hidden.png", "deep/er/b.png", "deep/._c.png", ".trash/d.png", "folder.png/e.png")
    assert names_of(find_images(tmp_path, recursive=False), tmp_path) == ["a.png"]
    assert names_of(find_images(tmp_path, recursive=True), tmp_path) == ["a.png", "deep/er/b.png", "folder.png/e.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path):
    touch(tmp_path, "set/a.png", "elsewhere/b.png")
    (tmp_path / "set" / "circle").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = find_images(tmp_path / "set", recursive=True)
    assert names_of(found, tmp_path / "set") == ["a.png", "more/b.png"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the image folder .*my set"):
        list_files(tmp_path / "my set", recursive=True)


def test_a_folder_without_images_is_named_and_subfolders_are_suggested(tmp_path):
    touch(tmp_path, "notes.txt", "deep/a.png")
    with pytest.raises(UserError, match=f"no images in '{re.escape(str(tmp_path))}'.*or --recursive"):
        find_images(tmp_path, recursive=False)
    assert list_files(tmp_path, recursive=False) == ([], [])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_to_itself_is_no_folder(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert names_of(find_images(tmp_path, recursive=True), tmp_path) == ["a.png"]


# Kinds that cannot be read here


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("b.heic", "Install pillow-heif (pip install -r requirements-formats.txt), or convert to PNG or JPEG."),
        ("b.HIF", "Install pillow-heif"),
        ("b.jxl", "Install pillow-jxl-plugin"),
        ("b.psd", "Convert to PNG or JPEG."),
        ("b.CR2", "Convert to PNG or JPEG."),
        ("b.svg", "Convert to PNG or JPEG."),
        ("sub/b.tga", "Convert to PNG or JPEG."),
    ],
)
def test_an_image_of_a_kind_that_cannot_be_read_is_named(tmp_path, name, remedy, no_packages, caplog):
    touch(tmp_path, "a.png", name, "b.txt")
    with caplog.at_level(logging.WARNING):
        assert names_of(find_images(tmp_path, recursive=True), tmp_path) == ["a.png"]
    [said] = caplog.messages
    assert said.startswith(f"1 images are left out: '{tmp_path / name}' cannot be read here.")
    assert remedy in said


def test_a_folder_of_such_images_alone_is_refused_with_the_remedy(tmp_path, no_packages):
    touch(tmp_path, *(f"{number:02}.heic" for number in range(12)), "a.jxl")
    with pytest.raises(UserError) as refused:
        find_images(tmp_path, recursive=False)
    assert "no image in" in str(refused.value)
    assert "09.heic' and 2 more cannot be read here. Install pillow-heif" in str(refused.value)
    assert "a.jxl' cannot be read here. Install pillow-jxl-plugin" in str(refused.value)


def test_a_working_file_beside_the_image_made_of_it_is_not_worth_a_word(tmp_path, caplog):
    touch(tmp_path, "a.png", "a.psd", "a.xcf")
    assert names_of(find_images(tmp_path, recursive=False), tmp_path) == ["a.png"]
    assert list_files(tmp_path, recursive=False).unreadable == []
    assert not caplog.messages


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch, caplog, no_packages):
    (tmp_path / "broken_heif.py").write_text("raise ImportError('built for another Pillow')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(kinds._PACKAGES, "HEIF", ("broken_heif", "pillow-heif"))
    assert "HEIF" not in kinds.readable_formats()
    assert "the package pillow-heif is installed but cannot be used: built for another Pillow" in caplog.messages


def test_a_folder_has_images_if_it_holds_one_that_can_be_read(tmp_path, no_packages):
    touch(tmp_path, "a.txt", "b.heic", "deep/c.png", ".d.png")
    assert not has_images(tmp_path)
    touch(tmp_path, "e.JPG")
    assert has_images(tmp_path)
    with pytest.raises(UserError, match="cannot read the image folder"):
        has_images(tmp_path / "gone")
