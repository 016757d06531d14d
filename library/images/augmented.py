"""An image as one visit of training shows it: the part that is drawn for the visit, in the colours drawn for it."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from library.captions.draws import CaptionDraw, drawn_numbers
from library.images.augmentation import Augmentation, drawn_part
from library.images.buckets import BucketedImage
from library.images.crops import Crop
from library.images.masks import load_masked

_CHANGED_SHARE = 0.33  # of the visits, as in the reference; half of them by hue, half by gamma
_LARGEST_TURN = 16 / 360  # of the hue
_LARGEST_GAMMA = 0.05  # more or less than 1
_HUES = 255  # of Pillow's colour circle, whose first and last value are the same
_BRIGHTEST = 255


class AugmentedImage(NamedTuple):
    """An image as a visit shows it, not flipped: uint8 (H, W, 3), where in the resized image that lies, and its mask.

    The mask is float32 (h, w), None if there is none.
    """

    pixels: np.ndarray
    crop: Crop
    mask: np.ndarray | None


def load_augmented(source: BucketedImage, augmentation: Augmentation, draw: CaptionDraw) -> AugmentedImage:
    """Return the image as a visit shows it.

    A function of the file and of what the draw says of the visit, and of nothing else. Raise `UnusableImage` for a
    file that cannot be used.
    """
    bucket = source.assignment.bucket
    part = drawn_part(source, augmentation, draw)
    pixels, mask = load_masked(source, part.resized, (part.left, part.top))
    return AugmentedImage(recolored(pixels, draw) if augmentation.color_aug else pixels, part.crop(bucket), mask)


def recolored(pixels: np.ndarray, draw: CaptionDraw) -> np.ndarray:
    """Return pixels (H, W, 3) with, in a third of the visits, another hue or another gamma; uint8, as they are.

    Either turns the hue by up to 16 degrees, which leaves brightness and saturation, or raises brightness (0 to 1) to
    a power of 0.95 to 1.05. Over many visits every colour keeps its mean. The reference raises values of 0 to 255 to
    that power, which brightens or darkens by up to a quarter and clips; ours is the change that it means.
    """
    whether, which, amount = drawn_numbers(draw, "image", "color", 3)
    if whether >= _CHANGED_SHARE:
        return pixels
    change = 2 * amount - 1
    return _turned(pixels, change * _LARGEST_TURN) if which < 0.5 else _raised(pixels, 1 + change * _LARGEST_GAMMA)


def _turned(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Pixels whose hue is turned by a part of the colour circle."""
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    # Pillow cuts the fraction of a hue off, so that 0.5 more is right on average; another 0.5 rounds.
    turned = [int(each + 1 + turn * _HUES + _HUES) % _HUES for each in range(_HUES + 1)]
    return np.array(Image.merge("HSV", (hue.point(turned), saturation, value)).convert("RGB"))


def _raised(pixels: np.ndarray, power: float) -> np.ndarray:
    """Pixels whose brightness, from 0 to 1, is raised to a power."""
    values = np.arange(_BRIGHTEST + 1) / _BRIGHTEST
    return (values**power * _BRIGHTEST + 0.5).astype(np.uint8)[pixels]
