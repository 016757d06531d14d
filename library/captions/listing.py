"""Which final texts of an image an encoder can meet in training: what the text cache encodes beforehand."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from library.captions.draws import CaptionDraw, Encoder
from library.captions.final_captions import CaptionPair, Wildcards, drawn_text, listed_text, split_wildcards, surrounded
from library.captions.rules import EMPTY, CaptionRules, PairRules
from library.config.errors import UserError, listed

MAX_EXPANSIONS = 64
"""Texts that lines and wildcards of one image may expand to for one encoder, for the cache to hold them all."""


def unlistable_settings(rules: CaptionRules) -> list[str]:
    """Return the settings because of which the texts of an encoder cannot be listed; none where they can."""
    if rules.caption_variants:
        return []
    is_on = {
        "shuffle_caption": rules.shuffle_caption,
        "caption_tag_dropout_rate": rules.caption_tag_dropout_rate > 0,
        "token_warmup_step": rules.token_warmup_step > 0,
    }
    return [name for name, on in is_on.items() if on]


def num_expansions(variants: Sequence[str], rules: CaptionRules) -> int:
    """Return to how many texts the lines and wildcards of a caption expand, without listing them."""
    return sum(math.prod(map(len, each.options)) for each in _taken_apart(variants, rules))


def texts_to_encode(captions: CaptionPair, rules: PairRules, encoder: Encoder, *, seed: int, key: str) -> list[str]:
    """Return every distinct text that `encoder` can meet of the image `key`, for the run of `seed`.

    They include the empty one where its caption may be dropped and is replaced by that. `unlistable_settings` must be
    none, and `require_listable` have passed.
    """
    own, variants = rules.of(encoder), captions.of(encoder)
    if own.changes_nothing:
        texts: list[str] = [variants[0]]
    elif own.caption_variants:
        draw = CaptionDraw(seed, epoch=1, key=key)
        numbers = range(own.caption_variants)
        texts = [drawn_text(variants, rules, encoder, draw.of_variant(number)) for number in numbers]
    else:
        texts = list(_expansions(variants, own))
    if rules.dropout.drops(encoder) and own.dropped_caption == EMPTY:
        texts.append("")
    return list(dict.fromkeys(texts))


def require_listable(captions: Mapping[str, CaptionPair], rules: PairRules, encoder: Encoder) -> None:
    """Raise `UserError` naming the images whose captions for `encoder` expand to more texts than the cache takes.

    `captions` are those of each image, by its key.
    """
    own = rules.of(encoder)
    if own.caption_variants or not own.enable_wildcard:
        return
    counts = {key: num_expansions(pair.of(encoder), own) for key, pair in captions.items()}
    too_many = {key: count for key, count in counts.items() if count > MAX_EXPANSIONS}
    if too_many:
        named = listed([f"'{key}' ({count:,})" for key, count in too_many.items()])
        raise UserError(
            f"the {encoder.upper()} captions of {len(too_many)} images expand to more than {MAX_EXPANSIONS} texts: "
            f"{named}.",
            f"Write fewer options, draw some of them with --caption_variants_{encoder}, or do not cache the outputs "
            f"of encoder {encoder.upper()}.",
        )


def _taken_apart(variants: Sequence[str], rules: CaptionRules) -> Iterator[Wildcards]:
    """Yield the wildcards of each line that may be drawn, each option once."""
    if not rules.enable_wildcard:
        yield Wildcards((surrounded(variants[0], rules),), ())
        return
    for line in dict.fromkeys(variants):
        literals, options = split_wildcards(surrounded(line, rules))
        yield Wildcards(literals, tuple(tuple(dict.fromkeys(each)) for each in options))


def _expansions(variants: Sequence[str], rules: CaptionRules) -> Iterator[str]:
    for each in _taken_apart(variants, rules):
        for chosen in product(*each.options):
            yield listed_text(each.filled(chosen), rules)
