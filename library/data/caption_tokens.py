"""Token ids of final texts, computed when a text is met, and the captions that are cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from library.captions.draws import ENCODERS, Encoder
from library.captions.rules import CaptionRules
from library.config.errors import listed
from library.data.subsets import Subset
from library.data.training_columns import TrainingSet
from library.data.training_images import TrainingImage
from library.sdxl.prompt_weights import position_weights, weighted_token_ids
from library.sdxl.tokenizers import CHUNK_TOKENS, PAD_G, PAD_L, in_chunks, token_ids

MAX_CHUNKS = 3
"""Chunks of the longest --max_token_length."""

_PADDING: Mapping[Encoder, int] = {"l": PAD_L, "g": PAD_G}
_REMEMBERED_TEXTS = 1 << 14  # in each worker, about 1 KB each


class ReadText(NamedTuple):
    """A final text as an encoder reads it: its token ids [N, 77] and, if any is not 1, the weights of 75 N + 2 places.

    `num_tokens` counts all tokens of the text, those that are cut included.
    """

    ids: list[list[int]]
    weights: list[float] | None
    num_tokens: int


@dataclass(frozen=True)
class CaptionTokenizer:
    """Final texts to token ids in captions of `num_chunks` chunks; texts met last are remembered.

    Nothing is tokenized before it is needed: at the start of a run that would take as long as all its captions are,
    in a visit it is a small part of reading the image.
    """

    num_chunks: int

    def read(self, text: str, rules: CaptionRules, encoder: Encoder) -> ReadText:
        """Return a final text of one encoder, cut at the limit of its rules and filled with empty chunks.

        Raise `UserError` for a weight that is no number.
        """
        ids, weights = self._ids_and_weights(text, rules)
        limit = rules.max_token_length
        chunks = in_chunks(ids[:limit], _PADDING[encoder], self.num_chunks).ids
        if not weights or all(weight == 1 for weight in weights[:limit]):
            return ReadText(chunks, None, len(ids))
        return ReadText(chunks, position_weights(weights[:limit], self.num_chunks), len(ids))

    def num_tokens(self, text: str, rules: CaptionRules) -> int:
        """Return how many tokens a text has, those that are cut included."""
        return len(self._ids_and_weights(text, rules)[0])

    def _ids_and_weights(self, text: str, rules: CaptionRules) -> tuple[Sequence[int], Sequence[float]]:
        if rules.weighted_captions:
            return _remembered_weighted(text)
        return _remembered(text), ()


@lru_cache(_REMEMBERED_TEXTS)
def _remembered(text: str) -> tuple[int, ...]:
    return tuple(token_ids(text))


@lru_cache(_REMEMBERED_TEXTS)
def _remembered_weighted(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids, weights = weighted_token_ids(text)
    return tuple(ids), tuple(weights)


def tokenizer_for(subsets: Iterable[Subset]) -> CaptionTokenizer:
    """Return what tokenizes the captions of subsets, in the chunks of the longest --max_token_length among them."""
    limits = [subset.captions.of(encoder).max_token_length for subset in subsets for encoder in ENCODERS]
    return CaptionTokenizer(max(limits) // CHUNK_TOKENS)


def cannot_be_cut(text: str, limit: int) -> bool:
    """Return whether a text has at most `limit` tokens for sure: each is a character of ASCII at least, but "&lt;"."""
    return len(text) <= limit and text.isascii() and "&" not in text


def cut_captions(images: Iterable[TrainingImage], tokens: CaptionTokenizer) -> list[str]:
    """Return a sentence for each encoder whose captions do not all fit: how many, the longest ones, the remedy."""
    training_set = TrainingSet.of(images)
    sentences = []
    for encoder in ENCODERS:
        cut: dict[str, tuple[int, int]] = {}
        rules = [subset.captions.of(encoder) for subset in training_set.subsets]
        shortest = min((own.max_token_length for own in rules), default=0)
        for row, text in enumerate(training_set.first_texts(encoder)):
            if cannot_be_cut(text, shortest):
                continue
            own = rules[training_set.columns["subset_of"][row]]
            num_tokens = tokens.num_tokens(text, own)
            if num_tokens > own.max_token_length:
                cut[training_set.texts["keys"][row]] = num_tokens, own.max_token_length
        if cut:
            sentences.append(_sentence(encoder, cut, len(training_set)))
    return sentences


def _sentence(encoder: Encoder, cut: Mapping[str, tuple[int, int]], num_images: int) -> str:
    """Return the sentence for one encoder; `cut` has the number of tokens and the limit of each caption too long."""
    longest_first = sorted(cut, key=lambda key: -cut[key][0])
    limits = sorted({limit for _, limit in cut.values()})
    names = listed([f"{key} ({cut[key][0]})" for key in longest_first])
    return (
        f"{len(cut)} of {num_images} {encoder.upper()} captions are longer than {' or '.join(map(str, limits))} tokens "
        f"and are cut: {names}. {_remedy(cut[longest_first[0]][0], limits[-1])}"
    )


def _remedy(num_tokens: int, limit: int) -> str:
    """Return what to do about a longest caption of `num_tokens`."""
    if limit == MAX_CHUNKS * CHUNK_TOKENS:
        return "Shorten them."
    num_needed = min(-(-num_tokens // CHUNK_TOKENS), MAX_CHUNKS)
    return f"Shorten them, or set --max_token_length={num_needed * CHUNK_TOKENS}."
