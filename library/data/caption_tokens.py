"""Token ids of final texts, computed once for each text that is known before, and the captions that are cut."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from library.config.errors import listed
from library.data.caption_draws import ENCODERS, Encoder
from library.data.caption_rules import CaptionRules
from library.data.captions import first_text
from library.data.training_set import TrainingImage
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
class TokenTable:
    """Token ids of texts in captions of `num_chunks` chunks; a text outside the table is tokenized when asked for.

    The ids (without start, end and padding) of all texts are packed into one tensor, which worker processes share:
    those of row r are `ids[starts[r] : starts[r + 1]]`. A million captions of 40 tokens take 160 MB.
    """

    num_chunks: int
    row_of: Mapping[str, int]
    starts: torch.Tensor  # int64 [R + 1]
    ids: torch.Tensor  # int32

    def read(self, text: str, rules: CaptionRules, encoder: Encoder) -> ReadText:
        """Return a final text of one encoder, cut at the limit of its rules and filled with empty chunks.

        Raise `UserError` for a weight that is no number.
        """
        ids, weights = self._ids_and_weights(text, rules)
        limit = rules.max_token_length
        chunks = in_chunks(ids[:limit], _PADDING[encoder], self.num_chunks).ids
        if all(weight == 1 for weight in weights[:limit]):
            return ReadText(chunks, None, len(ids))
        return ReadText(chunks, position_weights(weights[:limit], self.num_chunks), len(ids))

    def num_tokens(self, text: str, rules: CaptionRules) -> int:
        """Return how many tokens a text has, those that are cut included."""
        return len(self._ids_and_weights(text, rules)[0])

    def _ids_and_weights(self, text: str, rules: CaptionRules) -> tuple[Sequence[int], Sequence[float]]:
        if rules.weighted_captions:
            return _remembered_weighted(text)
        row = self.row_of.get(text)
        if row is None:
            return _remembered(text), ()
        starts, ids = self.starts.numpy(), self.ids.numpy()  # the same memory; torch takes seven times as long to slice
        return ids[starts[row] : starts[row + 1]].tolist(), ()


@lru_cache(_REMEMBERED_TEXTS)
def _remembered(text: str) -> tuple[int, ...]:
    return tuple(token_ids(text))


@lru_cache(_REMEMBERED_TEXTS)
def _remembered_weighted(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids, weights = weighted_token_ids(text)
    return tuple(ids), tuple(weights)


def tokenize_texts(texts: Iterable[str], num_chunks: int) -> TokenTable:
    """Return a table of the distinct texts; both encoders have the same ids, and differ in the padding alone."""
    row_of: dict[str, int] = {}
    for text in texts:
        row_of.setdefault(text, len(row_of))
    starts, ids = array("q", [0]), array("i")
    for text in tqdm(row_of, "tokenizing captions", unit="caption", disable=None, delay=1):
        ids.extend(token_ids(text))
        starts.append(len(ids))
    return TokenTable(num_chunks, row_of, _as_tensor(starts, np.int64), _as_tensor(ids, np.int32))


def tokenize_captions_of(images: Sequence[TrainingImage]) -> TokenTable:
    """Return a table of the captions of the training set as they are without chance, but for weighted ones.

    Its texts have the chunks of the longest --max_token_length that any encoder is given.
    """
    limits = {image.subset.captions.of(encoder).max_token_length for image in images for encoder in ENCODERS}
    return tokenize_texts(_unweighted_texts(images), num_chunks=max(limits) // CHUNK_TOKENS)


def _unweighted_texts(images: Iterable[TrainingImage]) -> Iterable[str]:
    for image in images:
        rules = image.subset.captions
        for encoder in ENCODERS:
            if not rules.of(encoder).weighted_captions:
                yield first_text(image.captions, rules, encoder)


def cut_captions(images: Sequence[TrainingImage], tokens: TokenTable) -> list[str]:
    """Return a sentence for each encoder whose captions do not all fit: how many, the longest ones, the remedy."""
    sentences = []
    for encoder in ENCODERS:
        cut: dict[str, tuple[int, int]] = {}
        for image in images:
            rules = image.subset.captions
            own = rules.of(encoder)
            num_tokens = tokens.num_tokens(first_text(image.captions, rules, encoder), own)
            if num_tokens > own.max_token_length:
                cut[image.key] = num_tokens, own.max_token_length
        if cut:
            sentences.append(_sentence(encoder, cut, len(images)))
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


def _as_tensor(numbers: array, dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(numbers, dtype=dtype))
