"""Random numbers that depend on what they are for, and never on what was drawn before them."""

import struct
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from library.config.digests import digest

Encoder = Literal["l", "g"]
"""One of the two text encoders, as the flags spell it."""

ENCODERS: tuple[Encoder, Encoder] = ("l", "g")

Stream = Literal["l", "g", "both", "image"]
"""Whose numbers these are: those of one encoder, one set for both, or those of the pixels."""

Operation = Literal[
    "caption_dropout",
    "caption_variants",
    "line",
    "wildcard",
    "shuffle",
    "tag_dropout",
    "crop",
    "face_scale",
    "face_position",
    "color",
]

_NUMBERS_PER_DIGEST = 8
_SEED_BYTES = 8
_DIGEST_FORMAT = struct.Struct(f"<{_NUMBERS_PER_DIGEST}Q")
_DROPPED_BITS = 11  # of 64: a float has 53
_UNIT = 2.0**-53
_BEFORE_TRAINING = 0  # the epoch of what is drawn once; training counts epochs from 1


class CaptionDraw(NamedTuple):
    """Which visit of which image the captions, or the pixels, are for.

    `epoch` counts from 1, `occurrence` from 0 to one less than the repeats of the image. `step` optimizer steps of
    `max_train_steps` are done; tag warm-up alone reads these two.
    """

    seed: int
    epoch: int
    key: str
    occurrence: int = 0
    step: float = 0
    max_train_steps: int = 0

    def of_variant(self, number: int) -> "CaptionDraw":
        """Return the draw of text `number` of `--caption_variants`: the same at every visit."""
        return CaptionDraw(self.seed, _BEFORE_TRAINING, self.key, number)


Numbers = Callable[[CaptionDraw, Stream, Operation, int], Sequence[float]]
"""A source of n numbers in [0, 1) for one operation of one visit."""


def drawn_numbers(draw: CaptionDraw, stream: Stream, operation: Operation, count: int) -> list[float]:
    """Return `count` independent uniform numbers in [0, 1), a hash of the arguments.

    A longer list of the same operation begins with the shorter one.
    """
    numbers: list[float] = []
    for block in range(-(-count // _NUMBERS_PER_DIGEST)):
        # The key stands last: it is the one part that may hold any character.
        message = f"{draw.seed}\0{draw.epoch}\0{draw.occurrence}\0{stream}\0{operation}\0{block}\0{draw.key}"
        block_digest = digest([message.encode("utf-8", errors="surrogatepass")], _DIGEST_FORMAT.size)
        numbers += [(bits >> _DROPPED_BITS) * _UNIT for bits in _DIGEST_FORMAT.unpack(block_digest)]
    return numbers[:count]


def noise_seed(draw: CaptionDraw) -> int:
    """Return the seed of the noise and the timestep of a visit: of the same visit in every way to split a step."""
    message = f"{draw.seed}\0{draw.epoch}\0{draw.occurrence}\0noise\0{draw.key}"
    return int.from_bytes(digest([message.encode("utf-8", errors="surrogatepass")], _SEED_BYTES), "little")


def numbers_without_chance(draw: CaptionDraw, stream: Stream, operation: Operation, count: int) -> list[float]:
    """Return the numbers by which the first of everything is chosen, nothing is moved and nothing dropped."""
    if operation == "shuffle":
        return [index / count for index in range(count)]
    # A rate of 1 drops whatever is below 1.
    return [1.0 if operation in ("caption_dropout", "tag_dropout") else 0.0] * count


def choice(number: float, num_options: int) -> int:
    """Return the index that a number in [0, 1) chooses among `num_options`."""
    return int(number * num_options)


def permutation(numbers: Sequence[float]) -> list[int]:
    """Return the order that independent numbers put as many things in, each order being equally likely."""
    return sorted(range(len(numbers)), key=numbers.__getitem__)
