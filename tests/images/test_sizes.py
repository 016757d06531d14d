"""Sizes that are remembered: an image that has not changed is not opened, one that has is."""

import os
from pathlib import Path

import pytest
from PIL import Image

from library.images.reading import UnusableImage
from library.images.sizes import FILE_NAME, ImageSizes
from library.sdxl.sizes import Size


def sizes_of(*images: Path, on_disk: bool = True) -> list[Size]:
    sizes = ImageSizes(on_disk=on_disk)
    read = [sizes.of(image) for image in images]
    sizes.save()
    return read


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20)).save(tmp_path / "é.png")
    return tmp_path / "é.png"


def test_an_image_with_the_same_bytes_and_time_is_not_opened_and_another_one_is(image: Path):
    assert sizes_of(image) == [Size(30, 20)]
    state = image.stat()
    image.write_bytes(b"x" * state.st_size)  # whoever opens it fails
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert sizes_of(image) == [Size(30, 20)]
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(UnusableImage):
        sizes_of(image)
    Image.new("RGB", (31, 20)).save(image)
    assert sizes_of(image) == [Size(31, 20)]


def test_an_image_that_is_gone_is_named(image: Path):
    image.unlink()
    with pytest.raises(UnusableImage, match=r"é\.png"):
        sizes_of(image)


def test_nothing_is_written_unless_asked_for(image: Path):
    assert sizes_of(image, on_disk=False) == [Size(30, 20)]
    assert list(image.parent.iterdir()) == [image]


@pytest.mark.parametrize("content", ["", "[]", '{"é.png": [1, 2]}', '{"é.png": [-1, 2, 3, 4]}', "\0"])
def test_a_damaged_file_is_written_again(image: Path, content: str):
    (image.parent / FILE_NAME).write_text(content)
    assert sizes_of(image) == [Size(30, 20)]
    assert "[30, 20, " in (image.parent / FILE_NAME).read_text()


def test_images_that_are_gone_are_forgotten_and_others_kept(image: Path):
    other = image.with_name("b.png")
    Image.new("RGB", (5, 6)).save(other)
    sizes_of(image, other)
    image.rename(image.with_name("c.png"))
    assert sizes_of(image.with_name("c.png")) == [Size(30, 20)]
    text = (image.parent / FILE_NAME).read_text()
    assert "c.png" in text and "b.png" in text and "\\u00e9" not in text


def test_a_folder_that_cannot_be_written_to_is_told_and_the_sizes_are_read(image: Path, capsys):
    (image.parent / FILE_NAME).mkdir()
    assert sizes_of(image) == [Size(30, 20)]
    assert "--cache_info: " in capsys.readouterr().err
