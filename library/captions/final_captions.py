"""What training does to a caption: the final texts of L and G, a pure function of entry, rules and draw."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from library.captions.draws import (
    CaptionDraw,
    Encoder,
    Numbers,
    Stream,
    choice,
    drawn_numbers,
    numbers_without_chance,
    permutation,
)
from library.captions.rules import CaptionDropout, CaptionRules, PairRules

_BRACES = re.compile(r"\{\{|\}\}|\{((?:\}\}|[^}])++)\}")
_WITHOUT_CHANCE = CaptionDraw(seed=0, epoch=1, key="", step=math.inf)  # after any warm-up


class CaptionPair(NamedTuple):
    """The captions of one image: for each encoder one text or more, its variants."""

    variants_l: tuple[str, ...]
    variants_g: tuple[str, ...]

    def of(self, encoder: Encoder) -> tuple[str, ...]:
        """Return the variants for one encoder."""
        return self.variants_l if encoder == "l" else self.variants_g


class FinalTexts(NamedTuple):
    """What the encoders read; a dropped caption has the text ""."""

    text_l: str
    text_g: str
    dropped_l: bool
    dropped_g: bool

    def of(self, encoder: Encoder) -> str:
        """Return the text for one encoder."""
        return self.text_l if encoder == "l" else self.text_g

    def is_dropped(self, encoder: Encoder) -> bool:
        """Return whether the caption of one encoder is dropped."""
        return self.dropped_l if encoder == "l" else self.dropped_g


def variants_of(caption: str | Sequence[str]) -> tuple[str, ...]:
    """Return the variants that a text, or a list of texts, of the metadata holds: its lines."""
    if isinstance(caption, str):
        return tuple(caption.split("\n"))
    return tuple(line for text in caption for line in text.split("\n"))


def final_texts(
    captions: CaptionPair, rules: PairRules, draw: CaptionDraw, numbers: Numbers = drawn_numbers
) -> FinalTexts:
    """Return what both encoders read of an image at one visit.

    The order of operations is that of sd-scripts 2026; tests/captions/test_golden.py names each deviation.
    """
    dropped_l, dropped_g = _dropped(rules.dropout, draw, numbers)
    text_l = "" if dropped_l else undropped_text(captions.variants_l, rules, "l", draw, numbers)
    text_g = "" if dropped_g else undropped_text(captions.variants_g, rules, "g", draw, numbers)
    return FinalTexts(text_l, text_g, dropped_l, dropped_g)


def first_text(captions: CaptionPair, rules: PairRules, encoder: Encoder) -> str:
    """Return the text of one encoder without chance: first variant, first option, no tag moved or missing."""
    return undropped_text(captions.of(encoder), rules, encoder, _WITHOUT_CHANCE, numbers_without_chance)


def undropped_text(
    variants: Sequence[str], rules: PairRules, encoder: Encoder, draw: CaptionDraw, numbers: Numbers = drawn_numbers
) -> str:
    """Return the final text of one encoder where its caption is not dropped."""
    own = rules.of(encoder)
    if own.changes_nothing:
        return variants[0]
    if own.caption_variants:
        (number,) = numbers(draw, rules.stream(encoder), "caption_variants", 1)
        draw = draw.of_variant(choice(number, own.caption_variants))
    return drawn_text(variants, rules, encoder, draw, numbers)


def drawn_text(
    variants: Sequence[str], rules: PairRules, encoder: Encoder, draw: CaptionDraw, numbers: Numbers = drawn_numbers
) -> str:
    """Return the text of one draw, be it of a visit or of one of the `--caption_variants`."""
    own, stream = rules.of(encoder), rules.stream(encoder)
    text = surrounded(_chosen_line(variants, own, stream, draw, numbers), own)
    if own.enable_wildcard:
        text = _expanded(text, stream, draw, numbers)
    return _separated(_joined_pieces(text, own, stream, draw, numbers), own)


def surrounded(text: str, rules: CaptionRules) -> str:
    """Return `text` between prefix and suffix, as kohya adds them: with a space even where the text is empty."""
    if rules.caption_prefix:
        text = f"{rules.caption_prefix} {text}"
    return f"{text} {rules.caption_suffix}" if rules.caption_suffix else text


class Wildcards(NamedTuple):
    """A text taken apart: `literals[0]`, one of `options[0]`, `literals[1]`, one of `options[1]`, ..."""

    literals: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]

    def filled(self, chosen: Sequence[str]) -> str:
        """Return the text with one chosen option at each place."""
        return self.literals[0] + "".join(
            option + literal for option, literal in zip(chosen, self.literals[1:], strict=True)
        )


def split_wildcards(text: str) -> Wildcards:
    """Return the wildcards `{a|b}` of a text and what stands around them, `{{` and `}}` read as braces.

    As in sd-scripts a wildcard ends at the first single `}`, so that nested ones leave a brace behind.
    """
    literals, options, end = [""], [], 0
    for match in _BRACES.finditer(text):
        literals[-1] += text[end : match.start()]
        end = match.end()
        if match[1] is None:
            literals[-1] += match[0][0]
        else:
            options.append(tuple(_unescaped(option) for option in match[1].split("|")))
            literals.append("")
    literals[-1] += text[end:]
    return Wildcards(tuple(literals), tuple(options))


def listed_text(text: str, rules: CaptionRules) -> str:
    """Return the final text of a text without wildcards, of rules that leave no tag to chance."""
    draw = CaptionDraw(seed=0, epoch=1, key="")
    return _separated(_joined_pieces(text, rules, "both", draw, numbers_without_chance), rules)


def _dropped(dropout: CaptionDropout, draw: CaptionDraw, numbers: Numbers) -> tuple[bool, bool]:
    """Return whether L's caption and G's caption are dropped: three exclusive events of one number."""
    dropped_l = dropped_g = False
    if dropout.total_rate:
        (number,) = numbers(draw, "both", "caption_dropout", 1)
        both = number < dropout.caption_dropout_rate
        dropped_l = number < dropout.rate_l
        dropped_g = both or dropout.rate_l <= number < dropout.total_rate
    if dropout.has_epochs:
        both = _is_due(dropout.caption_dropout_every_n_epochs, draw.epoch)
        dropped_l = dropped_l or both or _is_due(dropout.caption_dropout_every_n_epochs_l, draw.epoch)
        dropped_g = dropped_g or both or _is_due(dropout.caption_dropout_every_n_epochs_g, draw.epoch)
    return dropped_l, dropped_g


def _is_due(every_n_epochs: int, epoch: int) -> bool:
    return every_n_epochs > 0 and epoch % every_n_epochs == 0


def _chosen_line(
    variants: Sequence[str], rules: CaptionRules, stream: Stream, draw: CaptionDraw, numbers: Numbers
) -> str:
    if len(variants) == 1 or not rules.enable_wildcard:
        return variants[0]
    (number,) = numbers(draw, stream, "line", 1)
    return variants[choice(number, len(variants))]


def _expanded(text: str, stream: Stream, draw: CaptionDraw, numbers: Numbers) -> str:
    wildcards = split_wildcards(text)
    if not wildcards.options:
        return wildcards.literals[0]
    drawn = numbers(draw, stream, "wildcard", len(wildcards.options))
    return wildcards.filled(
        [options[choice(number, len(options))] for options, number in zip(wildcards.options, drawn, strict=True)]
    )


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def _joined_pieces(text: str, rules: CaptionRules, stream: Stream, draw: CaptionDraw, numbers: Numbers) -> str:
    """Return `text` after what happens to its tags, without `keep_tokens_separator`."""
    has_fixed_parts = bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in text
    if not (rules.changes_pieces or has_fixed_parts):
        return text
    head, flexible, tail = _fixed_parts(text, rules) if has_fixed_parts else _kept_pieces(text, rules)
    if rules.token_warmup_step > 0:
        flexible = flexible[: _num_warm(len(flexible), rules, draw)]
    if rules.shuffle_caption:
        order = permutation(numbers(draw, stream, "shuffle", len(flexible)))
        flexible = [flexible[index] for index in order]
    if rules.caption_tag_dropout_rate > 0:
        drawn = numbers(draw, stream, "tag_dropout", len(flexible))
        flexible = [piece for piece, number in zip(flexible, drawn, strict=True) if _stays(piece, number, rules)]
    return f"{rules.caption_separator} ".join(piece for piece in (*head, *flexible, *tail) if piece)


def _fixed_parts(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Return the pieces before the first separator of fixed parts, those behind it, and those after a second one."""
    parts = [_pieces(part, rules) for part in text.split(rules.keep_tokens_separator)]
    head, flexible, *tail = [[piece for piece in part if piece] for part in parts]
    return head, flexible, [piece for part in tail for piece in part]


def _kept_pieces(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    pieces = _pieces(text.strip(), rules)
    return pieces[: rules.keep_tokens], pieces[rules.keep_tokens :], []


def _pieces(text: str, rules: CaptionRules) -> list[str]:
    return [piece.strip() for piece in text.split(rules.caption_separator)]


def _num_warm(num_pieces: int, rules: CaptionRules, draw: CaptionDraw) -> int:
    """Return how many flexible pieces are in use at the step of `draw`; a warm-up below 1 is a fraction of the run."""
    warmup = rules.token_warmup_step
    num_steps = math.floor(warmup * draw.max_train_steps) if warmup < 1 else warmup
    if draw.step >= num_steps:
        return num_pieces
    minimum = rules.token_warmup_min
    return math.floor(draw.step * (num_pieces - minimum) / num_steps) + minimum


def _stays(piece: str, number: float, rules: CaptionRules) -> bool:
    return number >= rules.caption_tag_dropout_rate or piece.casefold() in rules.protected_tags


def _separated(text: str, rules: CaptionRules) -> str:
    if not rules.secondary_separator:
        return text
    return text.replace(rules.secondary_separator, rules.caption_separator)
