"""The preview in a model's header: any image, small, as a JPEG that a browser shows."""

import base64
import io

import pytest
from PIL import Image

from library.config.errors import UserError
from library.config.options import problems_of
from library.sdxl.model_spec import ModelSpecOptions
from library.sdxl.thumbnail import SIDE, thumbnail_of

HEAD = "data:image/jpeg;base64,"


def shown(url: str) -> Image.Image:
    assert url.startswith(HEAD)
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix(HEAD))))


@pytest.mark.parametrize(("mode", "color"), [("RGB", (255, 0, 0)), ("RGBA", (255, 0, 0, 255)), ("P", 0), ("L", 90)])
def test_an_image_of_any_kind_becomes_a_small_square_jpeg(mode, color, tmp_path):
    path = tmp_path / "my image.png"
    Image.new(mode, (1000, 600), color).save(path)
    image = shown(thumbnail_of(str(path)))
    assert (image.format, image.size, image.mode) == ("JPEG", (SIDE, SIDE), "RGB")


def test_what_is_transparent_is_white_and_the_middle_is_kept(tmp_path):
    image = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (100, 0, 150, 100))  # the left half of the middle square
    image.save(tmp_path / "a.png")
    small = shown(thumbnail_of(str(tmp_path / "a.png")))
    assert [tuple(round(value / 255) for value in small.getpixel((x, 128))) for x in (40, 200)] == [
        (0, 0, 1),
        (1, 1, 1),
    ]


def test_a_thumbnail_of_noise_stays_small(tmp_path):
    Image.effect_noise((1024, 1024), 200).save(tmp_path / "a.png")
    assert len(thumbnail_of(str(tmp_path / "a.png"))) < 100_000


def test_a_data_url_is_read_like_a_file(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (512, 512), (0, 200, 0)).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    Image.new("RGB", (512, 512), (0, 200, 0)).save(tmp_path / "a.png")
    assert thumbnail_of(url) == thumbnail_of(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "source", ["no such file.png", "data:image/png;base64,AAAA", "data:image/png,x", "data:;base64,?", "x" * 5000]
)
def test_what_is_no_image_is_named_before_training(source):
    with pytest.raises(UserError):
        thumbnail_of(source)
    assert problems_of(ModelSpecOptions(metadata_thumbnail=source)) == []  # light: nothing is read yet
    [problem] = ModelSpecOptions(metadata_thumbnail=source).heavy_problems()
    assert problem.startswith("--metadata_thumbnail: ")


def test_no_thumbnail_is_read_where_none_is_wanted():
    assert list(ModelSpecOptions(metadata_thumbnail="off").heavy_problems()) == []
    assert list(ModelSpecOptions().heavy_problems()) == []
