"""The drawn training set: repeatable, captions that say what the picture shows, several aspect ratios."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PLACES,
    PLAIN,
    SHAPES,
    SIZES,
    STYLE_CAPTIONS,
    STYLES,
    draw,
    fine_tuning_scenes,
    main,
    random_scene,
    write_training_set,
)
from library.images.files import find_images

SCENES = fine_tuning_scenes(24, seed=0)
by_scene = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.joint_caption)


def share_of(colour, picture):
    """The part of the pixels that have exactly this colour (edges are mixtures)."""
    return (np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=-1).mean()


def test_one_seed_gives_one_set_and_another_seed_another():
    assert fine_tuning_scenes(5, seed=3) == fine_tuning_scenes(5, seed=3)
    assert fine_tuning_scenes(5, seed=3) != fine_tuning_scenes(5, seed=4)
    assert draw(SCENES[0]).tobytes() == draw(fine_tuning_scenes(24, seed=0)[0]).tobytes()


def test_the_set_has_every_style_and_every_shape_but_not_the_pairs_that_are_held_out():
    pairs = Counter((scene.style, scene.shape) for scene in SCENES)
    assert len(pairs) == len(STYLES) * len(SHAPES) - len(HELD_OUT)
    assert not pairs.keys() & set(HELD_OUT)
    assert set(pairs.values()) == {2}
    assert {style for style, _ in HELD_OUT} == set(STYLES)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_every_shape_and_every_style_comes_in_landscape_portrait_and_square():
    assert {(width > height) - (width < height) for width, height in SIZES} == {-1, 0, 1}
    scenes = fine_tuning_scenes(72, seed=0)
    assert {(scene.style, scene.size) for scene in scenes} == {(style, size) for style in STYLES for size in SIZES}
    assert {(scene.shape, scene.size) for scene in scenes} == {(shape, size) for shape in SHAPES for size in SIZES}


@by_scene
def test_the_picture_shows_what_its_caption_names(scene):
    picture = draw(scene)
    where, _ = PLACES[scene.place]
    assert picture.size == scene.size
    assert scene.content == (f"a {scene.magnitude} {scene.colour} {scene.shape} {where}, {scene.background} background")
    # A large star's outline covers 8 % of a picture, and its blended edges are not counted.
    is_mixed = {"ink": scene.style == "pastel", "paper": scene.style == "twilight"}
    assert (share_of(COLOURS[scene.colour], picture) > 0.03) is not is_mixed["ink"]
    assert (share_of(BACKGROUNDS[scene.background], picture) > 0.3) is not is_mixed["paper"]
    others = [colour for name, colour in COLOURS.items() if name != scene.colour]
    assert all(share_of(colour, picture) == 0 for colour in others)


@pytest.mark.parametrize("place", PLACES)
def test_the_shape_is_where_its_caption_says(place):
    scene = next(scene for scene in map(random_scene, map(random.Random, range(1000))) if scene.place == place)
    is_ink = (np.asarray(draw(scene)) == ImageColor.getrgb(COLOURS[scene.colour])).all(axis=-1)
    rows, columns = is_ink.nonzero()
    x, y = columns.mean() / is_ink.shape[1], rows.mean() / is_ink.shape[0]
    _, (wanted_x, wanted_y) = PLACES[place]
    # The centre is moved by up to 0.03 of a side, and that of a triangle's area lies below the centre of its circle.
    assert abs(x - wanted_x) < 0.06 and abs(y - wanted_y) < 0.11


def test_each_style_changes_one_thing_and_leaves_the_rest():
    plain = random_scene(random.Random(4), magnitudes=["large"])
    ink, paper = COLOURS[plain.colour], BACKGROUNDS[plain.background]
    drawn = {style: draw(replace(plain, style=style)) for style in (PLAIN, *STYLES)}
    inked = {style: share_of(ink, picture) for style, picture in drawn.items()}
    blank = {style: share_of(paper, picture) for style, picture in drawn.items()}
    width, height = plain.size
    assert inked["outline"] < 0.8 * inked[PLAIN] and blank["outline"] > blank[PLAIN]
    in_frame = 1 - (width - 16) * (height - 16) / (width * height)
    assert blank[PLAIN] - blank["framed"] == pytest.approx(in_frame, abs=0.05)  # of which the shape may cover some
    assert inked["pastel"] == 0 and blank["pastel"] == blank[PLAIN]
    assert inked["twilight"] == inked[PLAIN] and blank["twilight"] == 0


def test_captions_name_each_style_by_words_of_its_own():
    words = [re.findall(r"\w+", caption) for caption in STYLE_CAPTIONS.values()]
    assert len(set(itertools.chain(*words))) == sum(map(len, words))


@pytest.mark.parametrize("joint", [False, True])
def test_each_picture_lies_on_the_disk_with_its_captions_beside_it(joint, tmp_path):
    folder = tmp_path / "my set" / "images"
    write_training_set(folder, SCENES[:3], joint=joint)
    images = find_images(folder, recursive=False)
    assert [image.name for image in images] == ["01.png", "02.png", "03.png"]
    for image, scene in zip(images, SCENES, strict=False):
        caption_g, caption_l = (
            image.with_suffix(suffix).read_text(encoding="utf-8").strip() for suffix in (".caption", ".txt")
        )
        if joint:
            assert caption_g == caption_l == f"{STYLE_CAPTIONS[scene.style]}, {scene.content}"
        else:
            assert (caption_g, caption_l) == (scene.content, STYLE_CAPTIONS[scene.style])
        with Image.open(image) as picture:
            assert picture.tobytes() == draw(scene).tobytes()


def test_the_script_says_what_it_has_drawn(tmp_path, capsys):
    assert main([str(tmp_path), "--num_pictures", "2", "--seed", "5"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert fine_tuning_scenes(2, seed=5)[0].content in capsys.readouterr().out
