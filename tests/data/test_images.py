"""Pictures: which files count, what becomes of each mode and orientation, and how unusable ones are named."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from library.config.errors import UserError
from library.data.images import (
    UnusableImage,
    find_images,
    list_images,
    load_rgb,
    load_rgb_and_alpha,
    read_size,
    resize_and_crop,
)
from library.sdxl.sizes import Size

ORIENTATIONS = range(1, 9)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names_of(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def pixels_of(image):
    return np.asarray(image).astype(int)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def damaged(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def exif_with(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# Which files


def test_pictures_are_found_by_suffix_in_any_case_and_sorted(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "c.JPEG", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF", "i.avif", "ü ö.Jpg")
    touch(tmp_path, "a.txt", "a.caption", "a.npz", "a.jpg.partial", "noext")
    expected = ["a.jpg", "b.PNG", "c.JPEG", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF", "i.avif", "ü ö.Jpg"]
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
    with pytest.raises(UserError, match=r"cannot read the picture folder .*my set"):
        list_images(tmp_path / "my set", recursive=True)


def test_a_folder_without_pictures_is_named_and_subfolders_are_suggested(tmp_path):
    touch(tmp_path, "notes.txt", "deep/a.png")
    with pytest.raises(UserError, match=f"no pictures in '{re.escape(str(tmp_path))}'.*or --recursive"):
        find_images(tmp_path, recursive=False)
    assert list_images(tmp_path, recursive=False) == []


# What becomes of them


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_picture_and_its_size_are_upright_whatever_exif_says(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    stored = Image.new("RGB", (64, 32), "black")
    stored.paste("white", (0, 0, 32, 16))  # the first stored corner
    stored.save(path, exif=exif_with(orientation))
    upright = load_rgb(path)
    # EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored picture are to be shown
    shown_right, shown_bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    width, height = (64, 32) if orientation <= 4 else (32, 64)
    corner = (width - 4 if shown_right else 4, height - 4 if shown_bottom else 4)
    assert upright.size == read_size(path) == (width, height)
    assert upright.getpixel(corner)[0] > 200  # lossy formats: white is not exactly 255
    assert pixels_of(upright).mean() == pytest.approx(255 / 4, abs=10)


def test_orientation_after_the_pixels_of_a_png_counts_too(tmp_path):
    data = encoded(Image.new("RGB", (30, 20)), "PNG", exif=exif_with(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    last_chunk = data.index(b"IEND") - 4
    path = tmp_path / "late.png"
    path.write_bytes(data[:start] + data[end:last_chunk] + data[start:end] + data[last_chunk:])
    assert read_size(path) == load_rgb(path).size == (20, 30)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "bmp"])
def test_the_size_is_read_without_decoding_the_pixels(tmp_path, suffix):
    # Only a reader of the header alone can tell the size of a picture whose pixels are missing.
    data = encoded(Image.fromarray(noise(300, 200)), suffix)
    path = damaged(tmp_path, f"half.{suffix}", data[: len(data) // 2])
    assert read_size(path) == Size(300, 200)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("I;16", 0x8080, "png", (128, 128, 128)),
        ("I;16", 65535, "tif", (255, 255, 255)),
        ("I", 0x4040, "tif", (64, 64, 64)),
        ("F", 0.5, "tif", (128, 128, 128)),
        ("F", 200.0, "tif", (200, 200, 200)),
        ("F", 51400.0, "tif", (200, 200, 200)),
        ("RGBA", (255, 0, 0, 255), "png", (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("LA", (0, 51), "png", (204, 204, 204)),
    ],
)
def test_every_mode_becomes_eight_bit_rgb_with_alpha_on_white(tmp_path, mode, colour, suffix, expected):
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (5, 4), colour).save(path)
    image = load_rgb(path)
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert image.getcolors() == [(20, expected)]


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        pytest.param(Image.new("L", (2, 1), 9), 9, id="grey"),
        pytest.param(Image.new("RGB", (2, 1), (1, 2, 3)), (1, 2, 3), id="rgb"),
        pytest.param(Image.new("I;16", (2, 1), 999), 999, id="16-bit grey"),
        pytest.param(Image.new("RGB", (2, 1), (1, 2, 3)).convert("P"), 0, id="palette"),
    ],
)
def test_a_transparent_colour_is_alpha_too(tmp_path, image, transparency):
    path = tmp_path / "keyed.png"
    if image.mode == "P":
        transparency = image.getpixel((0, 0))
    image.putpixel((1, 0), 0 if image.mode != "P" else transparency + 1)
    image.save(path, transparency=transparency)
    rgb, alpha = load_rgb_and_alpha(path)
    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 255]
    assert rgb.getpixel((0, 0)) == (255, 255, 255)


def test_alpha_comes_as_a_mask_of_the_upright_picture_and_none_without_alpha(tmp_path):
    image = Image.new("RGBA", (30, 20), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 30, 1))
    image.save(tmp_path / "alpha.png", exif=exif_with(6))
    Image.new("RGB", (30, 20)).save(tmp_path / "plain.png")
    rgb, alpha = load_rgb_and_alpha(tmp_path / "alpha.png")
    assert (alpha.mode, alpha.size, rgb.size) == ("L", (20, 30), (20, 30))
    assert [alpha.getpixel((x, 15)) for x in (0, 18, 19)] == [255, 255, 0]  # the first row is the last column now
    assert load_rgb_and_alpha(tmp_path / "plain.png")[1] is None


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animated_files_give_their_first_frame(tmp_path, suffix):
    path = tmp_path / f"animated.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    assert load_rgb(path).getpixel((8, 8)) == (255, 0, 0)


# Those that cannot be used


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_picture_is_named(tmp_path, suffix):
    data = encoded(Image.fromarray(noise(64, 64)), suffix)
    path = damaged(tmp_path, f"half ü.{suffix.lower()}", data[: len(data) // 2])
    with pytest.raises(
        UnusableImage, match=f"'{re.escape(str(path))}' cannot be used: .+ Replace the file or remove it."
    ):
        load_rgb(path)


@pytest.mark.parametrize("read", [load_rgb, read_size])
@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the file is empty"), (b"<html>not found</html>", "it is not a picture of a known format")],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, read, data, reason):
    path = damaged(tmp_path, "x.png", data)
    with pytest.raises(UnusableImage, match=f"'{re.escape(str(path))}' cannot be used: {reason}"):
        read(path)


@pytest.mark.parametrize("read", [load_rgb, read_size])
def test_a_folder_and_a_file_that_is_gone_are_named(tmp_path, read):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UnusableImage, match=r"folder.png' cannot be used: it is a folder"):
        read(tmp_path / "folder.png")
    with pytest.raises(UnusableImage, match=r"gone.png' cannot be used: No such file or directory"):
        read(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    data = encoded(Image.new("1", (8, 8)), "PNG")
    start = data.index(b"IHDR") + 4
    header = struct.pack(">II", 60_000, 60_000) + data[start + 8 : start + 13]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = damaged(tmp_path, "bomb.png", data[:start] + header + checksum + data[start + 17 :])
    with pytest.raises(UnusableImage, match=r"bomb.png' cannot be used: it has too many pixels"):
        load_rgb(path)


@pytest.mark.parametrize("value", [-1.0, 70_000.0, float("nan")])
def test_grey_values_of_an_unknown_scale_are_not_guessed(tmp_path, value):
    path = tmp_path / "height map.tif"
    Image.new("F", (4, 4), value).save(path)
    with pytest.raises(UnusableImage, match=r"height map.tif' cannot be used: its grey values go from"):
        load_rgb(path)


# Resizing


@pytest.mark.parametrize("resized", [Size(9, 7), Size(4, 5), Size(8, 7), Size(1, 1), Size(3, 6)])
def test_shrinking_averages_the_areas_that_the_new_pixels_cover(resized):
    original = noise(9, 7)
    # Each new pixel is a whole number of pixels of a picture enlarged by the new size: an exact mean.
    enlarged = original.repeat(resized.height, axis=0).repeat(resized.width, axis=1).astype(float)
    means = enlarged.reshape(resized.height, 7, resized.width, 9, 3).mean(axis=(1, 3))
    shrunk = resize_and_crop(Image.fromarray(original), resized, resized)
    assert (shrunk.dtype, shrunk.shape) == (np.uint8, (resized.height, resized.width, 3))
    np.testing.assert_allclose(shrunk, means, atol=0.501)  # rounding to whole numbers; float32 sums


def test_enlarging_uses_lanczos():
    image = Image.fromarray(noise(9, 7))
    expected = np.asarray(image.resize((18, 14), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize_and_crop(image, Size(18, 14), Size(18, 14)), expected)


@pytest.mark.parametrize("resized", [Size(20, 15), Size(60, 45)], ids=["shrunk", "enlarged"])
def test_the_crop_is_the_centre_of_the_resized_picture(resized):
    image = Image.fromarray(noise(40, 30))
    whole = resize_and_crop(image, resized, resized)
    np.testing.assert_array_equal(resize_and_crop(image, resized, Size(13, 8)), _centre(whole, 13, 8))


def _centre(pixels, width, height):
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def test_a_mask_keeps_to_the_crop_of_its_picture():
    image = Image.fromarray(noise(40, 30))
    mask = image.getchannel("R")
    for resized in (Size(20, 15), Size(60, 45)):
        cropped = resize_and_crop(mask, resized, Size(16, 8))
        assert cropped.shape == (8, 16)
        np.testing.assert_array_equal(cropped, resize_and_crop(image, resized, Size(16, 8))[..., 0])
