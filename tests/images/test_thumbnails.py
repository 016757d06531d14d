"""Small versions of images, kept outside of the set."""

import io
import os

import pytest
from PIL import Image

from library.images import thumbnails
from library.images.reading import UnusableImage
from library.images.thumbnails import remove_old_thumbnails, thumbnail


def opened(content):
    return Image.open(io.BytesIO(content))


def test_a_thumbnail_is_upright_on_white_and_kept_until_the_image_changes(tmp_path):
    image, kept = tmp_path / "a.jpg", tmp_path / "cache"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1200, 600), "red").save(image, exif=exif)
    first = thumbnail(image, 256, kept)
    assert opened(first).size == (128, 256)
    [file] = kept.glob("*/*.jpg")
    file.write_bytes(b"")  # a crash may leave it empty
    assert thumbnail(image, 256, kept) == first
    file.write_bytes(b"kept \xff\xd9")
    assert thumbnail(image, 256, kept) == b"kept \xff\xd9"
    Image.new("RGB", (100, 60), "blue").save(image)
    assert opened(thumbnail(image, 256, kept)).size == (100, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "cache"]
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert opened(thumbnail(tmp_path / "clear.png", 256, kept)).getpixel((5, 5)) == (255, 255, 255)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for name in ("a.jpg", "gone.jpg"):
        with pytest.raises(UnusableImage, match=name):
            thumbnail(tmp_path / name, 256, tmp_path / "cache")


def test_a_disk_that_takes_nothing_is_no_obstacle(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert opened(thumbnail(tmp_path / "a.png", 256, tmp_path / "cache")).size == (10, 10)


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    for number in range(10):
        file = tmp_path / "ab" / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (number, number))
    assert remove_old_thumbnails(tmp_path, largest=1000, kept=300) == 0
    assert remove_old_thumbnails(tmp_path, largest=999, kept=300) == 7
    assert sorted(path.stem for path in tmp_path.glob("*/*")) == ["7", "8", "9"]
    assert thumbnails.remove_old_thumbnails(tmp_path / "none") == 0
