"""Images: what becomes of each mode and orientation, what does not matter, and how unusable files are named."""

import io
import os
import re
import socket
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from library.images import reading
from library.images.buckets import covering_size
from library.images.reading import UnusableImage, load_cropped, load_rgb, load_rgb_and_alpha, read_size, require_whole
from library.sdxl.sizes import Size

ORIENTATIONS = range(1, 9)


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


def png_chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_with(chunk, *, late=False):
    """A PNG of 30x20 pixels of noise with one more chunk, before or after its pixels."""
    data = encoded(Image.fromarray(noise(30, 20)), "PNG")
    start = data.index(b"IEND" if late else b"IDAT") - 4
    return data[:start] + chunk + data[start:]


# What becomes of them


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_image_and_its_size_are_upright_whatever_exif_says(tmp_path, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    stored = Image.new("RGB", (64, 32), "black")
    stored.paste("white", (0, 0, 32, 16))  # the first stored corner
    stored.save(path, exif=exif_with(orientation))
    upright = load_rgb(path)
    # EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored image are to be shown
    shown_right, shown_bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    width, height = (64, 32) if orientation <= 4 else (32, 64)
    corner = (width - 4 if shown_right else 4, height - 4 if shown_bottom else 4)
    assert upright.size == read_size(path) == (width, height)
    assert upright.getpixel(corner)[0] > 200  # lossy formats: white is not exactly 255
    assert pixels_of(upright).mean() == pytest.approx(255 / 4, abs=10)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_images_of_every_mode_are_upright(tmp_path, suffix, mode):
    if (suffix, mode) == ("png", "CMYK"):
        pytest.skip("PNG has no CMYK")
    path = tmp_path / f"turned.{suffix}"
    Image.new(mode, (64, 32)).save(path, exif=exif_with(6))
    assert read_size(path) == load_rgb(path).size == (32, 64)


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
    # Only a reader of the header alone can tell the size of an image whose pixels are missing.
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
    path = tmp_path / f"image.{suffix}"
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


def test_alpha_comes_as_a_mask_of_the_upright_image_and_none_without_alpha(tmp_path):
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
def test_a_truncated_image_is_named(tmp_path, suffix):
    data = encoded(Image.fromarray(noise(64, 64)), suffix)
    path = damaged(tmp_path, f"half ü.{suffix.lower()}", data[: len(data) // 2])
    with pytest.raises(
        UnusableImage, match=f"'{re.escape(str(path))}' cannot be used: .+ Replace the file or remove it."
    ):
        load_rgb(path)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_an_image_that_is_cut_short_is_found_without_decoding_the_others(tmp_path, suffix, monkeypatch):
    data = encoded(Image.fromarray(noise(64, 64)), suffix)
    notes = b"notes of a camera" if suffix in ("PNG", "JPEG") else b""
    whole = damaged(tmp_path, f"whole.{suffix.lower()}", data + notes)
    for missing in (1, len(data) // 3, len(data) * 2 // 3):
        cut = damaged(tmp_path, f"cut.{suffix.lower()}", data[:-missing])
        with suppress(UnusableImage):
            load_rgb(cut)
            continue  # the last bytes were none of the image's
        with pytest.raises(UnusableImage, match="cut"):
            require_whole(cut)
    monkeypatch.setattr("library.images.reading.load_rgb", None)
    require_whole(whole)


def test_an_image_without_the_end_of_its_format_that_can_be_decoded_is_used(tmp_path):
    data = encoded(Image.fromarray(noise(64, 64)), "PNG")
    require_whole(damaged(tmp_path, "long notes.png", data + bytes(10_000)))
    with pytest.raises(UnusableImage, match=r"gone\.png' cannot be used: No such file"):
        require_whole(tmp_path / "gone.png")


@pytest.mark.parametrize("read", [load_rgb, read_size])
@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the file is empty"), (b"<html>not found</html>", "it is not an image of a known format")],
)
def test_a_file_that_is_no_image_is_named(tmp_path, read, data, reason):
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


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("read", [load_rgb, read_size])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path, kind, read, monkeypatch):
    if os.name == "nt":
        pytest.skip("POSIX files")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = tmp_path / "x.png"
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            listening.bind("x.png")
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(UnusableImage, match=rf"x.png' cannot be used: it is a (named )?{kind}, not a file"):
            read(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "there is not enough memory for it"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
        (OverflowError("too large to convert"), "too large to convert"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (KeyError(17), "17"),
        (IndexError(), "IndexError"),
        (TypeError("unsupported operand"), "unsupported operand"),
        (AttributeError("no attribute 'tile'"), "no attribute 'tile'"),
        (AssertionError(), "AssertionError"),
        (NotImplementedError("not yet"), "not yet"),
        (struct.error("unpack requires 4 bytes"), "unpack requires 4 bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_decoder_raises_is_said_of_its_image(tmp_path, error, reason, monkeypatch):
    def load(image):
        raise error

    path = damaged(tmp_path, "x.png", encoded(Image.fromarray(noise(30, 20)), "PNG"))
    monkeypatch.setattr(PngImageFile, "load", load)
    for read in (load_rgb, lambda path: load_cropped(path, Size(30, 20), Size(24, 16))):
        with pytest.raises(UnusableImage, match=rf"x.png' cannot be used: {re.escape(reason)}\. Replace"):
            read(path)


def test_memory_that_lacks_for_resizing_is_said_of_its_image(tmp_path, monkeypatch):
    def resize(*arguments, **named):
        raise MemoryError

    path = damaged(tmp_path, "x.png", encoded(Image.fromarray(noise(30, 20)), "PNG"))
    monkeypatch.setattr(reading, "resize_and_crop", resize)
    with pytest.raises(UnusableImage, match=r"x.png' cannot be used: there is not enough memory for it"):
        load_cropped(path, Size(30, 20), Size(24, 16))


def test_a_jpeg_of_very_many_passes_is_given_up(tmp_path, monkeypatch):
    data = encoded(Image.fromarray(noise(640, 640)), "JPEG", progressive=True, quality=95)
    last = data.rindex(b"\xff\xda")
    path = damaged(tmp_path, "slow.jpg", data[:last] + data[last:-2] * 400 + data[-2:])
    monkeypatch.setattr(reading, "DECODING_SECONDS", 0.2)
    with pytest.raises(UnusableImage, match=r"slow.jpg' cannot be used: it takes longer to decode than 0\.2 seconds"):
        load_rgb(path)


# What of a file does not matter


_LONG = bytes(3_000_000)
_NOTES = {
    "a long profile": png_chunk(b"iCCP", b"p\0\0" + zlib.compress(_LONG)),
    "a profile that is no profile": png_chunk(b"iCCP", b"p\0\7junk"),
    "a long compressed text": png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(_LONG)),
    "a text of an unknown compression": png_chunk(b"zTXt", b"parameters\0\5abc"),
    "a long compressed text in UTF-8": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(_LONG)),
    "a text that is no UTF-8": png_chunk(b"iTXt", b"workflow\0\0\0\0\0\xff\xfe"),
    "a very long text": png_chunk(b"tEXt", b"workflow\0" + b"x" * 70_000_000),
    **{
        f"a bad checksum in {name}": png_chunk(name.encode(), content, checksum=1)
        for name, content in {
            "tEXt": b"parameters\0a cat",
            "zTXt": b"parameters\0\0" + zlib.compress(b"a cat"),
            "iTXt": b"workflow\0\0\0\0\0{}",
            "iCCP": b"p\0\0" + zlib.compress(b"profile"),
            "gAMA": bytes(4),
            "pHYs": bytes(9),
            "tIME": bytes(7),
            "prVt": b"?",
        }.items()
    },
    "half a gamma": png_chunk(b"gAMA", b"\0"),
    "half a chromaticity": png_chunk(b"cHRM", b"\0"),
    "half a resolution": png_chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("note", _NOTES.values(), ids=_NOTES)
def test_what_a_png_says_beside_its_pixels_does_not_matter(tmp_path, note, late):
    path = damaged(tmp_path, "noted.png", png_with(note, late=late))
    assert read_size(path) == (30, 20)
    np.testing.assert_array_equal(pixels_of(load_rgb(path)), noise(30, 20))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS"])
def test_damage_to_what_a_png_consists_of_is_found(tmp_path, name):
    palette = Image.fromarray(noise(30, 20)).convert("P")
    data = bytearray(encoded(palette, "PNG", transparency=3))
    start = data.index(name)
    [length] = struct.unpack(">I", data[start - 4 : start])
    data[start + 4 + length] ^= 1  # its checksum
    with pytest.raises(UnusableImage, match=r"damaged.png' cannot be used"):
        load_rgb(damaged(tmp_path, "damaged.png", bytes(data)))


_TURNED = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "compressed"])
def test_a_png_is_turned_as_its_xmp_text_says(tmp_path, zipped, late):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", _TURNED, zip=zipped)
    [(name, content, *_)] = info.chunks
    data = png_with(_NOTES["a long profile"] + png_chunk(name, content), late=late)
    path = damaged(tmp_path, "turned.png", data)
    assert read_size(path) == load_rgb(path).size == (20, 30)


_EXIF = exif_with(6).tobytes()
_DAMAGED_EXIF = {
    "png, a bad checksum": png_with(png_chunk(b"eXIf", _EXIF, checksum=1)),
    "png, junk": png_with(png_chunk(b"eXIf", b"junk")),
    "png, a long text": png_with(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_LONG))),
    "png, no hexadecimal numbers": png_with(png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz")),
    "webp, junk": encoded(Image.fromarray(noise(30, 20)), "WEBP", exif=b"Exif\0\0junk"),
}


@pytest.mark.parametrize("data", _DAMAGED_EXIF.values(), ids=_DAMAGED_EXIF)
def test_an_image_with_damaged_exif_is_used_as_it_lies_and_that_is_said(tmp_path, data, caplog):
    path = damaged(tmp_path, "photograph", data)
    assert read_size(path) == load_rgb(path).size == (30, 20)
    assert caplog.messages == [f"'{path}': its EXIF data are damaged; it is used as it lies in the file"]


# Large images


def test_an_image_of_200_megapixels_is_read(tmp_path):
    image = Image.new("1", (20_000, 10_000), 1)
    image.paste(0, (0, 0, 10_000, 10_000))
    image.save(tmp_path / "large.png")
    assert read_size(tmp_path / "large.png") == (20_000, 10_000)
    cropped = load_cropped(tmp_path / "large.png", Size(128, 64), Size(64, 64))
    assert cropped.pixels.shape == (64, 64, 3)
    assert np.unique(cropped.pixels[:, :32]).tolist() == [0]
    assert np.unique(cropped.pixels[:, 32:]).tolist() == [255]


def test_a_small_file_of_a_very_long_image_takes_the_memory_of_its_bucket(tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (1, 1_000_000), "red").save(path)
    bucket = Size(512, 512)
    cropped = load_cropped(path, covering_size(bucket, read_size(path)), bucket)
    assert cropped.pixels.shape == (512, 512, 3)
    assert np.unique(cropped.pixels.reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


# Formats


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is a HEIF file. Install pillow-heif"),
        (b"\xff\x0a\xe8\x30\x13\x01", "it is a JXL file. Install pillow-jxl-plugin"),
    ],
)
def test_a_file_that_an_optional_package_reads_is_named_with_it_whatever_its_suffix(
    tmp_path, data, remedy, monkeypatch
):
    monkeypatch.setattr(reading, "readable_formats", lambda: ("PNG", "JPEG"))
    monkeypatch.setattr(reading, "_formats", lambda: ("PNG", "JPEG"))
    with pytest.raises(UnusableImage, match=re.escape(f"x.jpg' cannot be used: {remedy}")):
        load_rgb(damaged(tmp_path, "x.jpg", data))


def test_a_file_that_would_start_another_program_is_not_opened(tmp_path):
    path = damaged(tmp_path, "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UnusableImage, match="it is not an image of a known format"):
        load_rgb(path)


@pytest.mark.parametrize(("package", "image_format"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_optional_packages_read_their_format(tmp_path, package, image_format, mode):
    pytest.importorskip(package)
    reading._formats()
    image = Image.new(mode, (64, 32), "black")
    image.paste("red", (0, 0, 32, 32))
    path = damaged(tmp_path, "x", encoded(image, image_format, quality=95))
    rgb, alpha = load_rgb_and_alpha(path)
    assert read_size(path) == rgb.size == (64, 32)
    assert (alpha is None) == (mode == "RGB")
    assert rgb.getpixel((8, 16))[0] > 230 > 20 > rgb.getpixel((56, 16))[0]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_phone_photographs_are_upright(tmp_path, orientation):
    pytest.importorskip("pillow_heif")
    reading._formats()
    stored = Image.new("RGB", (64, 32), "black")
    stored.paste("white", (0, 0, 32, 16))
    path = damaged(tmp_path, "x.heic", encoded(stored, "HEIF", exif=exif_with(orientation), quality=95))
    assert read_size(path) == load_rgb(path).size


def test_a_jpeg_xl_that_asks_for_terabytes_is_refused_before_it_is_decoded(tmp_path):
    # Its decoder would end the process.
    size = (0b11 << 1) | ((900_000_000 - 1) << 3) | (511 << 38)
    path = damaged(tmp_path, "bomb.jxl", b"\xff\x0a" + size.to_bytes(8, "little") + bytes(8))
    with pytest.raises(UnusableImage, match=r"bomb.jxl' cannot be used: it has too many pixels, more than 400,000,000"):
        read_size(path)
