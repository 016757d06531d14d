"""How often regularization images are shown: until they are as many as the others of their data set."""

from collections.abc import Sequence
from typing import Protocol

from library.data.subsets import Subset


class OfSubset(Protocol):
    """An image that belongs to a subset."""

    @property
    def subset(self) -> Subset: ...


def balanced_repeats(repeats: Sequence[int], num_visits: int) -> list[int]:
    """Return the repeats of regularization images beside `num_visits` visits of others, as kohya's trainers count.

    Images are taken with their own `repeats` until they suffice, the rest is left out (0). Where all of them do not
    suffice, one repeat after another is added from the first image on.
    """
    balanced = [0] * len(repeats)
    total = 0
    for index, number in enumerate(repeats):
        if total >= num_visits:
            return balanced
        balanced[index] = number
        total += number
    missing = max(0, num_visits - total)
    return [number + missing // len(repeats) + (i < missing % len(repeats)) for i, number in enumerate(balanced)]


def repeats_of(images: Sequence[OfSubset]) -> list[int]:
    """Return the repeats of each image in an epoch: those of its subset, regularization images balanced."""
    return repeats_in([image.subset for image in images])


def repeats_in(subsets: Sequence[Subset]) -> list[int]:
    """Return what `repeats_of` does, of the subset of each image."""
    repeats = [subset.num_repeats for subset in subsets]
    for dataset in {subset.dataset for subset in subsets if subset.is_reg}:
        members = [i for i, subset in enumerate(subsets) if subset.dataset == dataset]
        regular = [i for i in members if subsets[i].is_reg]
        num_visits = sum(repeats[i] for i in members if not subsets[i].is_reg)
        for i, number in zip(regular, balanced_repeats([repeats[i] for i in regular], num_visits), strict=True):
            repeats[i] = number
    return repeats
