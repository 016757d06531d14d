"""Draw a small training set of shapes, each picture with its two captions: G names the content, L the style.

python demo/pictures.py "my set/images"                 12 pictures of up to 256 pixels, a second
python demo/pictures.py "my set/images" --num_pictures 60 --seed 7
"""

import argparse
import itertools
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw

Point = tuple[float, float]

# Names that captions use, with the colours that are drawn.
COLOURS = {"red": "#d22f27", "orange": "#ef8a17", "green": "#2e9e4f", "blue": "#2a5db0", "purple": "#7d3c98"}
BACKGROUNDS = {"white": "#ffffff", "yellow": "#fbe7a1", "grey": "#c9ced6", "black": "#15181d"}
SHAPES = ("circle", "triangle", "square", "star")
STYLES = ("flat colours", "line drawing", "stripes", "polka dots")
SIZES = ((256, 256), (256, 192), (192, 256), (256, 160), (144, 256))
"""Width and height in pixels: landscape, portrait and square, so that several buckets are used."""

_OVERSAMPLING = 4  # drawn this much larger, then averaged: smooth edges
_PERIOD = 16  # pixels from one stripe or dot to the next
_LINE_WIDTH = 6  # pixels


@dataclass(frozen=True)
class Scene:
    """All that one picture shows. `size` is (width, height) in pixels, `centre` and `radius` are parts of its sides."""

    shape: str
    colour: str
    background: str
    style: str
    size: tuple[int, int]
    centre: Point
    radius: float
    """Of the circle around the shape, as a part of the shorter side."""

    @property
    def caption_g(self) -> str:
        """The content: what is shown, in which colour, on what."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"

    @property
    def caption_l(self) -> str:
        """The style: how it is drawn."""
        return self.style


def make_scenes(num_pictures: int, seed: int) -> list[Scene]:
    """Scenes drawn from `seed`: every size in turn, every pair of shape and style once before one comes again."""
    generator = random.Random(seed)
    pairs = list(itertools.product(SHAPES, STYLES))
    generator.shuffle(pairs)
    chosen = zip(range(num_pictures), itertools.cycle(pairs), itertools.cycle(SIZES), strict=False)
    return [
        Scene(
            shape=shape,
            colour=generator.choice(list(COLOURS)),
            background=generator.choice(list(BACKGROUNDS)),
            style=style,
            size=size,
            centre=(generator.uniform(0.4, 0.6), generator.uniform(0.4, 0.6)),
            radius=generator.uniform(0.28, 0.38),
        )
        for _, (shape, style), size in chosen
    ]


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    width, height = (side * _OVERSAMPLING for side in scene.size)
    ink = ImageChops.multiply(_silhouette(scene), _texture(scene))
    picture = Image.new("RGB", (width, height), ImageColor.getrgb(BACKGROUNDS[scene.background]))
    picture.paste(ImageColor.getrgb(COLOURS[scene.colour]), mask=ink)
    return picture.reduce(_OVERSAMPLING)


def write_training_set(folder: Path, num_pictures: int, seed: int) -> list[Scene]:
    """Write 01.png, 01.caption (G), 01.txt (L), 02.png ... into `folder`; gives the scenes in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = make_scenes(num_pictures, seed)
    for number, scene in enumerate(scenes, start=1):
        picture = folder / f"{number:02d}.png"
        draw(scene).save(picture)
        picture.with_suffix(".caption").write_text(f"{scene.caption_g}\n", encoding="utf-8")
        picture.with_suffix(".txt").write_text(f"{scene.caption_l}\n", encoding="utf-8")
    return scenes


# -- masks: white where there is ink ----------------------------------------------------------------------------------


def _mask(scene: Scene) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty mask of the oversampled size, and what draws on it."""
    width, height = scene.size
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING), 0)
    return mask, ImageDraw.Draw(mask)


def _silhouette(scene: Scene) -> Image.Image:
    """The shape: filled, or its contour for a line drawing."""
    mask, pen = _mask(scene)
    corners = _corners(scene)
    if scene.style == "line drawing":
        # Once around and one side more: the joint at the first corner is closed too.
        pen.line([*corners, *corners[:2]], fill=255, width=_LINE_WIDTH * _OVERSAMPLING, joint="curve")
    else:
        pen.polygon(corners, fill=255)
    return mask


def _corners(scene: Scene) -> list[Point]:
    """The corners of the shape in pixels of the oversampled picture; a circle has many."""
    width, height = scene.size
    radius = scene.radius * min(scene.size)
    inner_radius = 0.45 * radius if scene.shape == "star" else radius  # every other corner
    num_corners = {"circle": 96, "triangle": 3, "square": 4, "star": 10}[scene.shape]
    first_angle = math.pi / 4 if scene.shape == "square" else -math.pi / 2  # a flat top, or a corner at the top
    corners = []
    for corner in range(num_corners):
        angle = first_angle + 2 * math.pi * corner / num_corners
        distance = inner_radius if corner % 2 else radius
        x = scene.centre[0] * width + distance * math.cos(angle)
        y = scene.centre[1] * height + distance * math.sin(angle)
        corners.append((x * _OVERSAMPLING, y * _OVERSAMPLING))
    return corners


def _texture(scene: Scene) -> Image.Image:
    """The pattern of the style, over the whole picture; all ink for styles that have none."""
    mask, pen = _mask(scene)
    period = _PERIOD * _OVERSAMPLING
    if scene.style == "stripes":
        for start in range(-mask.height, mask.width, period):
            pen.line([(start, mask.height), (start + mask.height, 0)], fill=255, width=period // 3)
    elif scene.style == "polka dots":
        for x, y in itertools.product(range(0, mask.width, period), range(0, mask.height, period)):
            pen.ellipse([x, y, x + period * 0.65, y + period * 0.65], fill=255)
    else:
        pen.rectangle([0, 0, *mask.size], fill=255)
    return mask


def main(argv: Sequence[str] | None = None) -> int:
    """Write the training set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where pictures and captions are written")
    parser.add_argument("--num_pictures", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    scenes = write_training_set(arguments.folder, arguments.num_pictures, arguments.seed)
    print(f"{len(scenes)} pictures in '{arguments.folder}', for example:")
    print(f"  01.caption (G): {scenes[0].caption_g}")
    print(f"  01.txt     (L): {scenes[0].caption_l}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
