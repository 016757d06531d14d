"""Final captions of one image as epoch after epoch of training would read them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from library.captions.draws import CaptionDraw, Encoder
from library.captions.final_captions import CaptionPair, final_texts
from library.captions.limits import Reading, reading
from library.captions.rules import PairRules


@dataclass(frozen=True)
class DrawnCaption:
    """What one encoder reads at a visit; a dropped caption has the text ""."""

    is_dropped: bool
    reading: Reading


@dataclass(frozen=True)
class DrawnPair:
    """The first visit of an image in one epoch."""

    epoch: int
    caption_l: DrawnCaption
    caption_g: DrawnCaption


def drawn_captions(
    captions: CaptionPair, rules: PairRules, *, key: str, seed: int, first_epoch: int, num_epochs: int
) -> list[DrawnPair]:
    """Return what both encoders read of the image `key` in some epochs of a run with this seed.

    They are the texts of `--dry_run`; tag warm-up, which depends on the length of the run, is over. Raise `UserError`
    for a weight that is no number.
    """
    return list(_draws(captions, rules, key, seed, range(first_epoch, first_epoch + num_epochs)))


def _draws(captions: CaptionPair, rules: PairRules, key: str, seed: int, epochs: range) -> Iterator[DrawnPair]:
    for epoch in epochs:
        texts = final_texts(captions, rules, CaptionDraw(seed, epoch, key, step=inf))

        def drawn(encoder: Encoder, texts=texts) -> DrawnCaption:  # type: ignore[no-untyped-def]
            return DrawnCaption(texts.is_dropped(encoder), reading(texts.of(encoder), rules.of(encoder)))

        yield DrawnPair(epoch, drawn("l"), drawn("g"))
