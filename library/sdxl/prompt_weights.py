"""Weights in a text, `(a:1.2)`, `(a)`, `[a]`: its pieces, its tokens with a weight each, and the weighted features."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.config.errors import UserError
from library.sdxl.tokenizers import CHUNK_TOKENS, in_chunks, token_ids

if TYPE_CHECKING:
    import torch

Piece = tuple[str, float]

_ROUND_BRACKETS = 1.1
_SQUARE_BRACKETS = 1 / 1.1
_MARKUP = frozenset("\\()[]")
_TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\]?) |
    (?P<open>[(\[]) |
    :(?P<weight>[+-]?[.\d]+)\) |
    (?P<close>[)\]]) |
    (?P<text>[^\\()\[\]:]+|:)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class WeightedCaption:
    """The token ids of a caption in N chunks of 77 and the weight of each position of its features.

    There are T = 75 N + 2 weights; start, end and padding weigh 1. `num_truncated` tokens did not fit.
    """

    ids: list[list[int]]
    weights: list[float]
    num_truncated: int


def weighted_pieces(text: str) -> list[Piece]:
    r"""Return what a text says, cut where its weight changes.

    `(a:1.2)` multiplies the weight by 1.2, `(a)` by 1.1, `[a]` by 1 / 1.1; brackets may be nested, and one that is
    never closed reaches to the end. `\(` is a bracket. Without its colon and number a weight is text. As in the WebUIs
    and sd-scripts. Raises `UserError` for a weight like "1.2.3".
    """
    if _MARKUP.isdisjoint(text):
        return [(text, 1.0)]
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _TOKEN.finditer(text):
        if match["open"]:
            opened[match["open"]].append(len(pieces))
        elif match["weight"] and opened["("]:
            _multiply(pieces, opened["("].pop(), _number(match["weight"], text))
        elif match["close"] == ")" and opened["("]:
            _multiply(pieces, opened["("].pop(), _ROUND_BRACKETS)
        elif match["close"] == "]" and opened["["]:
            _multiply(pieces, opened["["].pop(), _SQUARE_BRACKETS)
        else:
            pieces.append((match[0] if match["escaped"] is None else match["escaped"], 1.0))
    for first in opened["("]:
        _multiply(pieces, first, _ROUND_BRACKETS)
    for first in opened["["]:
        _multiply(pieces, first, _SQUARE_BRACKETS)
    return _merged(pieces) or [("", 1.0)]


def weighted_token_ids(caption: str) -> tuple[list[int], list[float]]:
    """Return the token ids of a caption of any length, each piece by itself, and the weight of each token.

    Raise `UserError` as `weighted_pieces` does.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_pieces(caption):
        piece_ids = token_ids(text)
        ids += piece_ids
        weights += [weight] * len(piece_ids)
    return ids, weights


def position_weights(weights: Sequence[float], num_chunks: int) -> list[float]:
    """Return the weight of each of the 75 N + 2 positions of features, for the weights of the tokens of a text."""
    kept = weights[: num_chunks * CHUNK_TOKENS]
    padding = [1.0] * (num_chunks * CHUNK_TOKENS - len(kept))
    return [1.0, *kept, *padding, 1.0]


def tokenize_weighted(caption: str, pad_token_id: int, num_chunks: int) -> WeightedCaption:
    """Return the token ids of a caption as `tokenize` has them, each piece by itself, and their weights.

    Raise `UserError` as `weighted_pieces` does.
    """
    ids, weights = weighted_token_ids(caption)
    tokenized = in_chunks(ids, pad_token_id, num_chunks)
    return WeightedCaption(tokenized.ids, position_weights(weights, num_chunks), tokenized.num_truncated)


def weighted_features(features: "torch.Tensor", weights: "torch.Tensor") -> "torch.Tensor":
    """Return features [..., C] of one encoder times their weights [...]: hidden states by position, or pooled vectors.

    The mean is not restored, as in sd-scripts.
    """
    return (features * weights.unsqueeze(-1)).to(features.dtype)


def _multiply(pieces: list[Piece], first: int, factor: float) -> None:
    pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]


def _number(weight: str, text: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise UserError(
            f"the caption '{text}' has the weight '{weight}', which is no number.",
            r"Correct it, or write brackets that are text as \( and \).",
        ) from None


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces with neighbours of equal weight joined."""
    merged: list[Piece] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged
