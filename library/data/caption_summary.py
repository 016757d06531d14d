"""The captions of a training set in numbers: texts, encodings, lengths, and words that blur the division."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from library.captions.draws import ENCODERS, Encoder
from library.captions.final_captions import first_text
from library.captions.listing import texts_to_encode, unlistable_settings
from library.data.caption_notices import words_of
from library.data.caption_tokens import CaptionTokenizer
from library.data.training_images import TrainingImage

BIN = 25
"""Tokens in one bar of the histogram."""

_MOST_WORDS = 20


@dataclass(frozen=True)
class EncoderSummary:
    """The captions of one encoder.

    `num_texts` distinct texts can be met, None where they are drawn at each visit; as many are encoded before training
    if the encoder is cached. `histogram` counts captions by tokens, `BIN` to a bar.
    """

    num_captions: int
    num_texts: int | None
    is_cached: bool
    num_empty: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class CaptionSummary:
    """The captions of both encoders; `shared_words` stand in both captions of so many images, most frequent first."""

    encoder_l: EncoderSummary
    encoder_g: EncoderSummary
    num_pairs: int
    shared_words: tuple[tuple[str, int], ...]

    @property
    def num_encodings(self) -> int:
        """How many texts are encoded before training."""
        return sum(each.num_texts or 0 for each in (self.encoder_l, self.encoder_g) if each.is_cached)


def summarize(
    images: Sequence[TrainingImage], tokens: CaptionTokenizer, cached: Sequence[Encoder], seed: int
) -> CaptionSummary:
    """Return the summary, in one pass over the images for each encoder; `seed` is that of the run."""
    words: Counter[str] = Counter()
    for image in images:
        in_l, in_g = (words_of(first_text(image.captions, image.subset.captions, encoder)) for encoder in ENCODERS)
        words.update(in_l & in_g)
    return CaptionSummary(
        _of_encoder(images, tokens, "l", "l" in cached, seed),
        _of_encoder(images, tokens, "g", "g" in cached, seed),
        num_pairs=len({image.captions for image in images}),
        shared_words=tuple(words.most_common(_MOST_WORDS)),
    )


def _of_encoder(
    images: Sequence[TrainingImage], tokens: CaptionTokenizer, encoder: Encoder, is_cached: bool, seed: int
) -> EncoderSummary:
    can_be_listed = not any(unlistable_settings(image.subset.captions.of(encoder)) for image in images)
    texts: set[str] = set()
    bars: Counter[int] = Counter()
    num_empty = 0
    for image in images:
        rules = image.subset.captions
        first = first_text(image.captions, rules, encoder)
        num_tokens = tokens.num_tokens(first, rules.of(encoder))
        bars[num_tokens // BIN] += 1
        num_empty += not first
        if can_be_listed and (is_cached or not rules.of(encoder).enable_wildcard):
            texts.update(texts_to_encode(image.captions, rules, encoder, seed=seed, key=image.key))
    histogram = tuple(bars[index] for index in range(max(bars, default=-1) + 1))
    is_listed = can_be_listed and bool(texts)
    return EncoderSummary(
        num_captions=len({image.captions.of(encoder) for image in images}),
        num_texts=len(texts) if is_listed else None,
        is_cached=is_cached,
        num_empty=num_empty,
        histogram=histogram,
    )
