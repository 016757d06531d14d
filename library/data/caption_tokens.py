"""Token ids of the captions, computed once for each distinct text, and the captions that are cut."""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from library.config.errors import listed
from library.data.training_set import TrainingImage
from library.sdxl.tokenizers import CHUNK_TOKENS, PAD_G, PAD_L, CaptionTokens, in_chunks, token_ids

MAX_CHUNKS = 3
"""Chunks of the longest --max_token_length."""


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

    def ids_of(self, text: str) -> list[int]:
        """Return all token ids of a text, however long it is."""
        row = self.row_of.get(text)
        if row is None:
            return token_ids(text)
        ids: list[int] = self.ids[self.starts[row] : self.starts[row + 1]].tolist()
        return ids

    def num_cut(self, text: str) -> int:
        """Return how many tokens of a text do not fit into the chunks."""
        return max(0, len(self.ids_of(text)) - self.num_chunks * CHUNK_TOKENS)

    def chunks_of(self, texts: Iterable[str], pad_token_id: int) -> torch.Tensor:
        """Return the token ids of texts as an encoder reads them, int64 [B, N, 77]."""
        return torch.tensor([in_chunks(self.ids_of(text), pad_token_id, self.num_chunks).ids for text in texts])

    def tokens_of(self, captions_l: Iterable[str], captions_g: Iterable[str]) -> CaptionTokens:
        """Return the token ids of B caption pairs, L padded with the end token and G with zero."""
        return CaptionTokens(self.chunks_of(captions_l, PAD_L), self.chunks_of(captions_g, PAD_G))


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


def tokenize_captions_of(images: Collection[TrainingImage], num_chunks: int) -> TokenTable:
    """Return a table of all captions of the training set."""
    return tokenize_texts((text for image in images for text in (image.caption_l, image.caption_g)), num_chunks)


def cut_captions(images: Sequence[TrainingImage], tokens: TokenTable) -> list[str]:
    """Return a sentence for each encoder whose captions do not all fit: how many, the longest ones, the remedy."""
    cut_l = {image.key: tokens.num_cut(image.caption_l) for image in images}
    cut_g = {image.key: tokens.num_cut(image.caption_g) for image in images}
    return [_sentence(name, cut, tokens.num_chunks) for name, cut in (("L", cut_l), ("G", cut_g)) if any(cut.values())]


def _sentence(encoder: str, num_cut: Mapping[str, int], num_chunks: int) -> str:
    """Return the sentence for one encoder; `num_cut` holds the number of tokens that each image's caption loses."""
    num_kept = num_chunks * CHUNK_TOKENS
    longest_first = sorted((key for key, cut in num_cut.items() if cut), key=lambda key: -num_cut[key])
    names = listed([f"{key} ({num_kept + num_cut[key]})" for key in longest_first])
    return (
        f"{len(longest_first)} of {len(num_cut)} {encoder} captions are longer than {num_kept} tokens and are cut:"
        f" {names}. {_remedy(num_kept + num_cut[longest_first[0]], num_chunks)}"
    )


def _remedy(num_tokens: int, num_chunks: int) -> str:
    """Return what to do about a longest caption of `num_tokens`."""
    if num_chunks == MAX_CHUNKS:
        return "Shorten them."
    num_needed = min(-(-num_tokens // CHUNK_TOKENS), MAX_CHUNKS)
    return f"Shorten them, or set --max_token_length={num_needed * CHUNK_TOKENS}."


def _as_tensor(numbers: array, dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(numbers, dtype=dtype))
