"""Which images are held out for validation, and what is seen of them: the same at every visit."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from library.captions.final_captions import CaptionPair, first_text
from library.captions.rules import CaptionRules, PairRules
from library.config.digests import digest
from library.config.errors import UserError, listed
from library.data.found_images import FoundImage
from library.data.image_columns import FoundImages
from library.data.subsets import Subset
from library.images.augmentation import Augmentation

log = logging.getLogger(__name__)

_HASH_BYTES = 8


class Split(NamedTuple):
    """The images that are trained, in their order, and those that are not, in the order of their hashes."""

    training: FoundImages
    held_out: FoundImages


def place(seed: int, key: str) -> float:
    """Return a number in [0, 1), a hash of seed and key: an image is held out if it lies below the split."""
    message = f"{seed}\0{key}".encode("utf-8", errors="surrogatepass")
    return int.from_bytes(digest([message], _HASH_BYTES), "little") / 256**_HASH_BYTES


def split_off(found: Sequence[FoundImage], *, trains: bool = True) -> Split:
    """Return which images are trained and which are held out, as the subset of each says; the latter without chance.

    The key of an image within its subset decides, so that an image of two subsets stands on one side. Regularization
    images are trained. Raise `UserError` if a subset has a split and nothing is on one of the sides; without `trains`
    only if nothing is held out.
    """
    images = FoundImages.of(found)
    if not any(subset.validation_split for subset in images.used_subsets):
        return Split(images, FoundImages.of([]))
    is_held_out = np.fromiter(map(_is_held_out, images), bool, len(images))
    training = images.take(np.flatnonzero(~is_held_out))
    held_out = [images[row] for row in np.flatnonzero(is_held_out).tolist()]
    nothing_to_train = trains and all(subset.is_reg for subset in training.used_subsets)
    if nothing_to_train or not held_out:
        splits = listed(sorted({f"{image.subset.validation_split:g}" for image in found if not image.subset.is_reg}))
        raise UserError(
            f"a validation split of {splits} of {len(found)} images leaves none to "
            f"{'train' if nothing_to_train else 'validate'}.",
            "Set --validation_split nearer to 0.5, or another --validation_seed.",
        )
    _warn_of_images_on_both_sides(training, held_out)
    held_out.sort(key=lambda image: (_place_of(image), image.key))
    return Split(training, FoundImages.of(map(without_chance, held_out)))


def without_chance(image: FoundImage) -> FoundImage:
    """Return an image whose visits are all alike: final texts without chance, no flip, nothing dropped or augmented."""
    captions, subset = image.captions, image.subset
    first_l, first_g = (first_text(captions, subset.captions, encoder) for encoder in ("l", "g"))
    return image._replace(captions=CaptionPair((first_l,), (first_g,)), subset=_without_chance(subset))


def _without_chance(subset: Subset) -> Subset:
    rules = subset.captions
    return replace(
        subset,
        num_repeats=1,
        captions=PairRules(_read_alike(rules.rules_l), _read_alike(rules.rules_g)),
        augmentation=Augmentation(resize_interpolation=subset.augmentation.resize_interpolation),
    )


def _read_alike(rules: CaptionRules) -> CaptionRules:
    """Return rules that change no text, and read it as `rules` do."""
    return CaptionRules(
        weighted_captions=rules.weighted_captions,
        max_token_length=rules.max_token_length,
        dropped_caption=rules.dropped_caption,
    )


def _is_held_out(image: FoundImage) -> bool:
    return not image.subset.is_reg and _place_of(image) < image.subset.validation_split


def _place_of(image: FoundImage) -> float:
    return place(image.subset.validation_seed, image.key if image.own_key is None else image.own_key)


def _warn_of_images_on_both_sides(training: Sequence[FoundImage], held_out: Sequence[FoundImage]) -> None:
    trained = {image.file for image in training if image.file is not None}
    both = [f"'{image.file}'" for image in held_out if image.file in trained]
    if both:
        log.warning(
            "%d images are held out in one place and trained in another, so that their loss says little: %s",
            len(both),
            listed(both),
        )
