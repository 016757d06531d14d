"""Draw images of one shape each, and write them as a training set with a caption for each encoder.

python demo/pictures.py "my set/images"                 the training set of the demo: content for G, style for L
python demo/pictures.py "my set/images" --joint         the same images, with one joint caption for both encoders
"""

import argparse
import itertools
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, ...]

# Names in captions, and the colours that are drawn.
COLOURS = {"red": "#d42a22", "yellow": "#f0b414", "green": "#26984a", "blue": "#2458b4", "purple": "#8236a0"}
BACKGROUNDS = {"white": "#fafafa", "grey": "#a6acb4", "black": "#16181c"}
SHAPES = ("circle", "triangle", "square", "star")
PLACES = {  # name: the phrase of the caption, and the centre of the shape as fractions of width and height
    "left": ("on the left", (0.34, 0.5)),
    "right": ("on the right", (0.66, 0.5)),
    "top": ("at the top", (0.5, 0.34)),
    "bottom": ("at the bottom", (0.5, 0.66)),
    "middle": ("in the middle", (0.5, 0.5)),
}
RADII = {"small": 0.26, "large": 0.38}
"""Radius of the circle around the shape, as a fraction of the shorter side."""
PLAIN = "plain"
"""The style of the images on which the tiny SDXL was pretrained; no caption names it."""
STYLE_CAPTIONS = {
    "outline": "outline, hollow, contour drawing",
    "framed": "framed, thick border, edging",
    "pastel": "pastel, pale tint, chalk",
    "twilight": "twilight, evening glow",
}
"""The styles that the fine-tune adds, and their captions."""
STYLES = tuple(STYLE_CAPTIONS)
SIZES = ((96, 96), (128, 64), (64, 128))
"""Width and height in pixels: square, landscape and portrait, for three buckets."""
MAGNITUDES = ("large",)
"""Sizes of the shapes in the training set: large enough to show a style."""
HELD_OUT = (("outline", "square"), ("framed", "star"), ("pastel", "triangle"), ("twilight", "circle"))
"""Pairs of style and shape that are not in the training set, to measure whether they can be drawn nevertheless."""

_OVERSAMPLING = 4  # drawn this much larger and then averaged, for smooth edges
_LINE_WIDTH = 7  # pixels
_FRAME_WIDTH = 8  # pixels
_CHALK: Colour = (255, 255, 255)
_VIOLET: Colour = (130, 54, 160)
_JITTER = 0.03  # of the centre, as a fraction of each side, and of the radius


@dataclass(frozen=True)
class Scene:
    """What one image shows. `size` is (width, height) in pixels; `centre` and `radius` are fractions of its sides."""

    shape: str
    colour: str
    place: str
    magnitude: str
    """A key of `RADII`."""
    background: str
    style: str
    size: tuple[int, int]
    centre: Point
    radius: float

    @property
    def content(self) -> str:
        """The content: size, colour, shape, place and background."""
        where, _ = PLACES[self.place]
        return f"a {self.magnitude} {self.colour} {self.shape} {where}, {self.background} background"

    @property
    def style_caption(self) -> str:
        """The style, empty for a plain image."""
        return STYLE_CAPTIONS.get(self.style, "")

    @property
    def joint_caption(self) -> str:
        """Style and content in one caption, as written for both encoders."""
        return ", ".join(filter(None, [self.style_caption, self.content]))


def random_scene(
    generator: random.Random,
    styles: Sequence[str] = (PLAIN,),
    size: tuple[int, int] = SIZES[0],
    magnitudes: Sequence[str] = tuple(RADII),
) -> Scene:
    """Return a scene in which everything but the size of the image is random."""
    place = generator.choice(list(PLACES))
    magnitude = generator.choice(magnitudes)
    _, centre = PLACES[place]
    x, y = (part + generator.uniform(-_JITTER, _JITTER) for part in centre)
    return Scene(
        shape=generator.choice(SHAPES),
        colour=generator.choice(list(COLOURS)),
        place=place,
        magnitude=magnitude,
        background=generator.choice(list(BACKGROUNDS)),
        style=generator.choice(styles),
        size=size,
        centre=(x, y),
        radius=RADII[magnitude] + generator.uniform(-_JITTER, _JITTER),
    )


def fine_tuning_scenes(num_images: int, seed: int) -> list[Scene]:
    """Return the scenes of the demo: the pairs of style and shape except `HELD_OUT` in turn, in alternating sizes."""
    generator = random.Random(seed)
    pairs = [pair for pair in itertools.product(STYLES, SHAPES) if pair not in HELD_OUT]
    scenes = []
    for number in range(num_images):
        rounds, index = divmod(number, len(pairs))
        style, shape = pairs[index]
        size = SIZES[(index + rounds) % len(SIZES)]
        scenes.append(replace(random_scene(generator, size=size, magnitudes=MAGNITUDES), style=style, shape=shape))
    return scenes


def draw(scene: Scene) -> Image.Image:
    """Return the RGB image of a scene."""
    ink: Colour = ImageColor.getrgb(COLOURS[scene.colour])
    paper: Colour = ImageColor.getrgb(BACKGROUNDS[scene.background])
    if scene.style == "pastel":
        ink = _mixed(ink, _CHALK)
    if scene.style == "twilight":
        paper = _mixed(paper, _VIOLET)
    shape = _silhouette(scene)
    image = Image.new("RGB", shape.size, paper)
    image.paste(ink, mask=shape)
    if scene.style == "framed":
        image.paste(ink, mask=_frame(scene))
    return image.reduce(_OVERSAMPLING)


def write_training_set(folder: Path, scenes: Sequence[Scene], *, joint: bool) -> None:
    """Write 01.png, 01.caption (G), 01.txt (L), 02.png ... into `folder`.

    The caption for G is the content and that for L the style; with `joint`, both are the joint caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        image = folder / f"{number:02d}.png"
        caption_g, caption_l = (scene.joint_caption,) * 2 if joint else (scene.content, scene.style_caption)
        draw(scene).save(image)
        image.with_suffix(".caption").write_text(f"{caption_g}\n", encoding="utf-8")
        image.with_suffix(".txt").write_text(f"{caption_l}\n", encoding="utf-8")


def _mixed(colour: Colour, other: Colour) -> Colour:
    """Return the mean of two colours."""
    return tuple((part + other_part) // 2 for part, other_part in zip(colour, other, strict=True))


# -- masks: white where the ink goes -----------------------------------------------------------------------------------


def _silhouette(scene: Scene) -> Image.Image:
    """Return a mask of the shape, or of its contour, in the oversampled size."""
    mask, pen = _mask(scene)
    corners = _corners(scene)
    if scene.style == "outline":
        # One side more than the closed line, so that the first corner has a joint too.
        pen.line([*corners, *corners[:2]], fill=255, width=_LINE_WIDTH * _OVERSAMPLING, joint="curve")
    else:
        pen.polygon(corners, fill=255)
    return mask


def _mask(scene: Scene) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty mask, and the object that draws on it."""
    width, height = scene.size
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING), 0)
    return mask, ImageDraw.Draw(mask)


def _corners(scene: Scene) -> list[Point]:
    """Return the corners of the shape in pixels of the oversampled image; a circle has many."""
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


def _frame(scene: Scene) -> Image.Image:
    """Return a mask of the border along the four edges."""
    mask, pen = _mask(scene)
    pen.rectangle([0, 0, mask.width - 1, mask.height - 1], outline=255, width=_FRAME_WIDTH * _OVERSAMPLING)
    return mask


def main(argv: Sequence[str] | None = None) -> int:
    """Write the training set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write images and captions to")
    parser.add_argument("--num_pictures", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--joint", action="store_true", help="write one joint caption of style and content for both encoders"
    )
    arguments = parser.parse_args(argv)
    if arguments.num_pictures < 1:
        parser.error(f"--num_pictures is {arguments.num_pictures}; it must be 1 or more")
    scenes = fine_tuning_scenes(arguments.num_pictures, arguments.seed)
    write_training_set(arguments.folder, scenes, joint=arguments.joint)
    print(f"{len(scenes)} images in '{arguments.folder}', for example:")
    for suffix, encoder in ((".caption", "G"), (".txt", "L")):
        path = arguments.folder / f"01{suffix}"
        print(f"  {path.name:11}({encoder}): {path.read_text(encoding='utf-8').strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
