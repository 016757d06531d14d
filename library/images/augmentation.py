"""What may vary in an image from visit to visit, and which part of it a visit shows."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library.captions.draws import CaptionDraw, choice, drawn_numbers
from library.config.errors import UserError
from library.images.buckets import BucketedImage
from library.images.crops import Crop, true_crop_ltrb
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

RESIZE_INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
"""The names of `--resize_interpolation`, those of kohya's trainers."""

RESIZE_INTERPOLATION_HELP = (
    "Interpolation that resizes images to their buckets. Default: area to shrink, lanczos to enlarge. linear is "
    "bilinear, cubic is bicubic. Latents that were made with another one are stale."
)

_SAME_INTERPOLATION = {"linear": "bilinear", "cubic": "bicubic"}

# The name of an image ends in the centre, width and height of its face, in pixels of the upright image.
_FACE_IN_NAME = re.compile(r".*_(\d{1,6})_(\d{1,6})_(\d{1,6})_(\d{1,6})")
_UNSTEADINESS = 1 / 20  # of the face: how far its centre may lie from that of the crop, without --random_crop


@dataclass(frozen=True)
class Augmentation:
    """What varies in an image between visits, fields named as the flags; with cached latents only the flip can.

    The crop around a face is `face_crop_aug_range` (least, most) times as large as the face. `resize_interpolation`
    holds for every visit: None averages areas to shrink and uses Lanczos to enlarge.
    """

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None

    @property
    def moves_crop(self) -> bool:
        """Whether a visit may show another part of the image than the centre."""
        return self.random_crop or self.face_crop_aug_range is not None

    @property
    def changes_pixels(self) -> bool:
        """Whether pixels change from visit to visit by more than a flip, so that latents cannot be cached."""
        return bool(self.of_pixels)

    @property
    def of_pixels(self) -> list[str]:
        """The names of what changes pixels from visit to visit by more than a flip."""
        return [name for name in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(self, name)]


class Face(NamedTuple):
    """A face in an image: its centre and its size, in pixels."""

    x: int
    y: int
    width: int
    height: int

    @property
    def longer_side(self) -> int:
        """The larger of width and height."""
        return max(self.width, self.height)


class Part(NamedTuple):
    """A part of an image, of the size of its bucket: where it lies in the image resized to `resized`."""

    resized: Size
    left: int
    top: int

    def crop(self, bucket: Size) -> Crop:
        """Return the crop to condition on."""
        return Crop(self.left, self.top, self.resized.width - self.left - bucket.width)


def interpolation_of(name: str | None) -> str | None:
    """Return one spelling for all names of an interpolation: `bilinear` for `linear`, `bicubic` for `cubic`."""
    return None if name is None else _SAME_INTERPOLATION.get(name, name)


def parse_face_range(text: str) -> tuple[float, float]:
    """Return least and most of "2.0,4.0". Raise `UserError` for any other text."""
    try:
        least, most = (float(part) for part in text.split(","))
    except ValueError:
        least = most = 0.0
    if not 0 < least <= most < math.inf:
        raise UserError(
            f"'{text}' is not a range.",
            "Give the least and the most, such as 2.0,4.0: a crop two to four times as large as the face.",
        )
    return least, most


def face_in(path: Path, size: Size) -> Face | None:
    """Return the face that the name of an image tells: `name_x_y_width_height.jpg`, x and y of its centre.

    None if the name tells none, or one that does not lie in an image of `size`, as four numbers of a date may.
    """
    match = _FACE_IN_NAME.fullmatch(path.stem)
    if match is None:
        return None
    face = Face(*map(int, match.groups()))
    fits = face.x <= size.width and face.y <= size.height and face.width <= size.width and face.height <= size.height
    return face if fits and min(face) > 0 else None


def require_faces(images: Iterable[BucketedImage]) -> None:
    """Report how many of the images to crop around faces tell theirs. Raise `UserError` if none of them does."""
    faces = [face_in(image.path, image.size) for image in images]
    num_faces = len(faces) - faces.count(None)
    if faces and num_faces == 0:
        raise UserError(
            "--face_crop_aug_range: no name of an image tells where its face is.",
            "Name images name_x_y_width_height.jpg with centre and size of the face in pixels, such as "
            "anna_512_300_180_200.jpg, or leave out the flag.",
        )
    if num_faces < len(faces):
        log.info("%d of %d images are named for a face; the others are cropped without one", num_faces, len(faces))


def drawn_part(source: BucketedImage, augmentation: Augmentation, draw: CaptionDraw) -> Part:
    """Return the part of the image that a visit shows, drawn for it alone.

    Around a face if the name of the image tells one and `face_crop_aug_range` is set; else anywhere in the resized
    image with `random_crop`, each position being equally likely; else the centre.
    """
    if augmentation.face_crop_aug_range is not None:
        face = face_in(source.path, source.size)
        if face is not None:
            return _part_around(face, source, augmentation.face_crop_aug_range, augmentation.random_crop, draw)
    bucket, resized, _ = source.assignment
    if not augmentation.random_crop:
        left, top, _, _ = true_crop_ltrb(bucket, resized)
        return Part(resized, left, top)
    across, down = drawn_numbers(draw, "image", "crop", 2)
    return Part(
        resized,
        choice(across, resized.width - bucket.width + 1),
        choice(down, resized.height - bucket.height + 1),
    )


def _part_around(
    face: Face, source: BucketedImage, face_range: tuple[float, float], random_crop: bool, draw: CaptionDraw
) -> Part:
    """The part of the bucket's size whose shorter side is between least and most times the longer side of the face.

    As far as that neither enlarges the image nor leaves a part of the bucket empty.
    """
    bucket, size = source.assignment.bucket, source.size
    covering = max(bucket.width / size.width, bucket.height / size.height)
    largest, smallest = (max(covering, min(1.0, min(bucket) / (face.longer_side * factor))) for factor in face_range)
    [number] = drawn_numbers(draw, "image", "face_scale", 1)
    scale = smallest + number * (largest - smallest)
    resized = Size(_rounded(size.width * scale), _rounded(size.height * scale))
    unsteadiness = face.longer_side * scale * _UNSTEADINESS if face_range[0] != face_range[1] else 0.0

    def start(centre: float, part: int, whole: int, pair: Sequence[float]) -> int:
        # The sum of two numbers: near the face more often than far from it.
        moved = max(whole - centre, centre) * (sum(pair) - 1) if random_crop else unsteadiness * (2 * pair[0] - 1)
        return max(0, min(_rounded(centre + moved - part / 2), whole - part))

    numbers = drawn_numbers(draw, "image", "face_position", 4)
    return Part(
        resized,
        start(face.x * scale, bucket.width, resized.width, numbers[:2]),
        start(face.y * scale, bucket.height, resized.height, numbers[2:]),
    )


def _rounded(pixels: float) -> int:
    return math.floor(pixels + 0.5)
