"""What the start of a run says about captions and their rules, in sentences, and the captions that it refuses."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from library.captions.draws import ENCODERS, Encoder
from library.captions.final_captions import CaptionPair
from library.captions.rules import CaptionDropout, CaptionRules, PairRules
from library.config.errors import UserError, listed

if TYPE_CHECKING:
    from library.data.columns import Variants

_LONGEST_TAG = 8
"""Words; a longer piece between separators is taken for part of a sentence."""
_WORD = re.compile(r"\w{3,}")


def caption_notices(captions: Mapping[str, CaptionPair], rules: PairRules) -> list[str]:
    """Return what should worry the user about the captions of some images, by key, under the rules they share."""
    from library.data.columns import Captions  # and numpy, which the studio's first page need not wait for

    columns = Captions.of(captions)
    notices = list(_dropout_notices(rules.dropout))
    for encoder in ENCODERS:
        own, variants = rules.of(encoder), columns.variants(encoder)
        notices += _settings_notices(own, encoder)
        notices += _line_notices(variants, own, encoder)
        notices += _sentence_notices(variants, own, encoder)
    return notices


def words_of(text: str) -> set[str]:
    """Return the words of a text, of three letters or more, case folded."""
    return {word.casefold() for word in _WORD.findall(text)}


def dropout_sentence(dropout: CaptionDropout) -> str | None:
    """Return how often whole captions are dropped, or None where they never are."""
    parts = []
    if dropout.total_rate:
        parts.append(
            f"both {_percent(dropout.caption_dropout_rate)}, L alone {_percent(dropout.caption_dropout_rate_l)}, "
            f"G alone {_percent(dropout.caption_dropout_rate_g)} "
            f"(L in all {_percent(dropout.rate_l)}, G {_percent(dropout.rate_g)})"
        )
    epochs = {
        "both": dropout.caption_dropout_every_n_epochs,
        "L": dropout.caption_dropout_every_n_epochs_l,
        "G": dropout.caption_dropout_every_n_epochs_g,
    }
    parts += [f"{name} in epochs {count}, {2 * count}, ..." for name, count in epochs.items() if count]
    return f"captions dropped: {'; '.join(parts)}" if parts else None


def require_paired_lines(captions: Mapping[str, CaptionPair], rules: PairRules) -> None:
    """Raise `UserError` naming the images whose L and G captions differ in lines that are to be drawn together."""
    if not (rules.shared and rules.rules_l.enable_wildcard and rules.rules_g.enable_wildcard):
        return
    unpaired = [
        f"'{key}' ({len(pair.variants_l)} and {len(pair.variants_g)})"
        for key, pair in captions.items()
        if len(pair.variants_l) != len(pair.variants_g)
    ]
    if unpaired:
        raise UserError(
            f"--caption_draws=shared uses line n of L with line n of G, but {len(unpaired)} images have different "
            f"numbers of L and G lines: {listed(unpaired)}.",
            "Write as many lines for both, or use --caption_draws=separate.",
        )


def _dropout_notices(dropout: CaptionDropout) -> Iterator[str]:
    alone = dropout.caption_dropout_rate_l + dropout.caption_dropout_rate_g
    if alone and not (dropout.caption_dropout_rate or dropout.caption_dropout_every_n_epochs):
        yield (
            "captions of one encoder are dropped, but never both captions of an image: guidance has no unconditional "
            "case to learn from. --caption_dropout_rate drops both."
        )


def _settings_notices(rules: CaptionRules, encoder: Encoder) -> Iterator[str]:
    """Yield the settings of one encoder that overrule each other or have nothing to act on."""
    name = encoder.upper()
    if rules.keep_tokens and rules.keep_tokens_separator:
        yield (
            f"{name}: --keep_tokens={rules.keep_tokens} counts only in captions without the "
            f"--keep_tokens_separator '{rules.keep_tokens_separator}'."
        )
    with_tags = "--shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"
    idle = {
        "keep_tokens": (rules.keep_tokens and not rules.changes_pieces, with_tags),
        "protected_tags": (rules.protected_tags and not rules.caption_tag_dropout_rate, "--caption_tag_dropout_rate"),
        "token_warmup_min": (
            rules.token_warmup_min != CaptionRules.token_warmup_min and not rules.token_warmup_step,
            "--token_warmup_step",
        ),
    }
    for flag, (is_idle, needed) in idle.items():
        if is_idle:
            yield f"{name}: --{flag} has no effect without {needed}."


def _line_notices(captions: "Variants", rules: CaptionRules, encoder: Encoder) -> Iterator[str]:
    """Yield what becomes of lines and empty tags that kohya's trainer would treat otherwise, or not at all."""
    name = encoder.upper()
    num_several = captions.num_several
    if num_several and not rules.enable_wildcard:
        yield (
            f"{num_several} {name} captions have several lines; only the first is used. --enable_wildcard_{encoder} "
            "draws one of them at each visit."
        )
    separator = rules.keep_tokens_separator
    if separator and not rules.changes_pieces:
        num_removed = sum(separator in variants[0] for variants in captions)
        if num_removed:
            yield f"'{separator}' is removed from {num_removed} {name} captions; sd-scripts would train it as text."
    if rules.changes_pieces:
        num_empty = sum(not all(_pieces(variants[0], rules)) for variants in captions if variants[0])
        if num_empty:
            yield f"{num_empty} {name} captions have empty tags, which are left out; sd-scripts would keep them."


def _sentence_notices(captions: Sequence[Sequence[str]], rules: CaptionRules, encoder: Encoder) -> Iterator[str]:
    if not rules.shuffle_caption:
        return
    num_sentences = sum(looks_like_sentences(variants[0], rules) for variants in captions)
    if num_sentences > len(captions) / 2:
        other: Encoder = "g" if encoder == "l" else "l"
        yield (
            f"{encoder.upper()} captions look like sentences, whose parts are put into a random order: "
            f"--shuffle_caption_{other} shuffles {other.upper()} alone."
        )


def looks_like_sentences(caption: str, rules: CaptionRules) -> bool:
    """Return whether a caption is made of sentences, not tags."""
    return ". " in caption or any(len(piece.split()) > _LONGEST_TAG for piece in _pieces(caption, rules))


def _pieces(caption: str, rules: CaptionRules) -> list[str]:
    return [piece.strip() for piece in caption.split(rules.caption_separator)]


def _percent(rate: float) -> str:
    return f"{100 * rate:.4g} %"
