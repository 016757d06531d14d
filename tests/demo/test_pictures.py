"""The drawn training set: repeatable, captions that say what the picture shows, several aspect ratios."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    STYLES,
    draw,
    main,
    make_scenes,
    write_training_set,
)
from library.data.images import find_images

NUM_PICTURES = len(SHAPES) * len(STYLES)  # every pair of shape and style once
SCENES = make_scenes(NUM_PICTURES, seed=0)
by_scene = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.caption_g}, {scene.caption_l}")


def share_of(colour, picture):
    """The part of the pixels that have exactly this colour (edges are mixtures)."""
    return (np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=-1).mean()


def test_one_seed_gives_one_set_and_another_seed_another():
    assert make_scenes(5, seed=3) == make_scenes(5, seed=3)
    assert make_scenes(5, seed=3) != make_scenes(5, seed=4)
    assert draw(SCENES[0]).tobytes() == draw(make_scenes(NUM_PICTURES, seed=0)[0]).tobytes()


def test_every_pair_of_shape_and_style_comes_once_before_one_comes_again():
    assert len({(scene.shape, scene.style) for scene in SCENES}) == NUM_PICTURES
    again = make_scenes(NUM_PICTURES + 1, seed=0)
    assert (again[-1].shape, again[-1].style) == (again[0].shape, again[0].style)


def test_the_set_has_landscape_portrait_and_square_pictures_of_at_most_256_pixels():
    sizes = {scene.size for scene in SCENES}
    assert sizes == set(SIZES)
    assert {(width > height) - (width < height) for width, height in sizes} == {-1, 0, 1}
    assert max(max(size) for size in sizes) <= 256


@by_scene
def test_the_picture_shows_the_colours_that_its_g_caption_names(scene):
    picture = draw(scene)
    assert picture.size == scene.size
    assert scene.caption_g.split()[1:3] == [scene.colour, scene.shape]
    assert f"on a {scene.background} background" in scene.caption_g
    # A shape of radius 0.28 covers 6 % of the smallest square, a third of which is ink in the thinnest style.
    assert share_of(COLOURS[scene.colour], picture) > 0.01
    assert share_of(BACKGROUNDS[scene.background], picture) > 0.5
    others = [colour for name, colour in COLOURS.items() if name != scene.colour]
    assert all(share_of(colour, picture) == 0 for colour in others)


def test_g_names_the_content_and_l_the_style_and_neither_names_the_other():
    for scene in SCENES:
        assert scene.caption_l in STYLES
        assert not any(style in scene.caption_g for style in STYLES)
        assert not any(word in scene.caption_l.split() for word in [*SHAPES, *COLOURS, *BACKGROUNDS])


def test_the_style_changes_what_the_same_shape_looks_like():
    by_style = {scene.style: scene for scene in SCENES if scene.shape == "circle"}
    ink = {style: share_of(COLOURS[scene.colour], draw(scene)) for style, scene in by_style.items()}
    areas = {style: (scene.radius * min(scene.size)) ** 2 / np.prod(scene.size) for style, scene in by_style.items()}
    density = {style: ink[style] / (np.pi * areas[style]) for style in STYLES}
    assert density["flat colours"] > 0.95  # all but the blended edge
    assert all(density[style] < 0.6 for style in STYLES if style != "flat colours")


def test_each_picture_lies_on_the_disk_with_both_captions_beside_it(tmp_path):
    folder = tmp_path / "my set" / "images"
    scenes = write_training_set(folder, num_pictures=3, seed=1)
    images = find_images(folder, recursive=False)
    assert [image.name for image in images] == ["01.png", "02.png", "03.png"]
    for image, scene in zip(images, scenes, strict=True):
        assert image.with_suffix(".caption").read_text(encoding="utf-8").strip() == scene.caption_g
        assert image.with_suffix(".txt").read_text(encoding="utf-8").strip() == scene.caption_l
        with Image.open(image) as picture:
            assert picture.tobytes() == draw(scene).tobytes()


def test_the_script_says_what_it_has_drawn(tmp_path, capsys):
    assert main([str(tmp_path), "--num_pictures", "2", "--seed", "5"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert make_scenes(2, seed=5)[0].caption_g in capsys.readouterr().out
