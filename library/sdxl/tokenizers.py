"""Captions to the token ids of each text encoder; to count tokens imports neither torch nor transformers."""

import gzip
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

START_TOKEN = 49406
END_TOKEN = 49407
PAD_L = END_TOKEN
PAD_G = 0
CHUNK_TOKENS = 75
"""Tokens of text in one chunk; with the start and the end token it fills the encoders' 77 positions."""

_REMEMBERED_WORDS = 1 << 16  # some 15 MB
_NUM_MERGES = 49152 - 256 - 2
_START_TEXT, _END_TEXT = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CaptionTokens(NamedTuple):
    """Token ids of a batch of caption pairs, each [B, N, 77] (N chunks of 75 tokens with start and end)."""

    tokens_l: "torch.Tensor"
    tokens_g: "torch.Tensor"

    def to(self, device: "torch.device | str") -> "CaptionTokens":
        """Return the same ids on `device`."""
        return CaptionTokens(self.tokens_l.to(device), self.tokens_g.to(device))


@dataclass(frozen=True)
class TokenizedCaption:
    """Token ids of one caption in [N, 77] and how many tokens of its text did not fit."""

    ids: list[list[int]]
    num_truncated: int


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's tokens with their ids, and its merges: those that open_clip ships.

    They are found without importing that package, which takes seconds.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip_torch is not installed: pip install -r requirements.txt")
    with gzip.open(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    pairs = (line.split() for line in lines[1 : _NUM_MERGES + 1])
    merges = [(first, second) for first, second in pairs]
    letters = list(_byte_letters())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += [_START_TEXT, _END_TEXT]
    return {word: index for index, word in enumerate(words)}, merges


@cache
def _clip_tokenizer() -> "Tokenizer":
    """Return CLIP's BPE, put together as transformers' `CLIPTokenizer` does, whose import takes two seconds."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=_END_TEXT))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (_START_TEXT, _END_TEXT)]
    )
    return tokenizer


def _byte_letters() -> list[str]:
    """Return the printable letter of each byte, in the order of CLIP's vocabulary (GPT-2's byte alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(num_others)]


def save_tokenizer(folder: Path, pad_token_id: int) -> "CLIPTokenizer":
    """Save a tokenizer for a diffusers model that pads with `pad_token_id` (`PAD_L`, `PAD_G`); return it."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    saved = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token=next(token for token, index in vocabulary.items() if index == pad_token_id),
        model_max_length=CHUNK_TOKENS + 2,
        # G's padding is "!": unless told so, the tokenizer takes every exclamation mark of a text for padding.
        split_special_tokens=pad_token_id == PAD_G,
    )
    saved.save_pretrained(folder)
    saved.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for transformers before release 5
    return saved


def tokenize(caption: str, pad_token_id: int, num_chunks: int) -> TokenizedCaption:
    """Return token ids of one caption in `num_chunks` chunks, each start + 75 + end; the text is cleaned as CLIP's was.

    A chunk that the text does not fill ends in the end token and padding; text beyond the last chunk is cut.
    """
    return in_chunks(token_ids(caption), pad_token_id, num_chunks)


def token_ids(text: str) -> list[int]:
    """Return the token ids of a text of any length, without start and end; the text is cleaned as CLIP's was."""
    # No token of CLIP spans a space: the ids of a text are those of its words, which captions repeat.
    if _is_clean(text):
        return [token for word in text.split() for token in _ids_of_word(word)]
    return _encoded(cleaned(text))


def cleaned(text: str) -> str:
    """Return what is tokenized of a text: mojibake, entities and odd quotes are put right, as for CLIP's training."""
    if _is_clean(text):
        return text
    import ftfy  # a tenth of a second, for captions that need it

    return ftfy.fix_text(text)


def _is_clean(text: str) -> bool:
    """Return whether ftfy has nothing to change for sure: of printable ASCII it changes entities alone."""
    return text.isascii() and text.isprintable() and "&" not in text


@lru_cache(_REMEMBERED_WORDS)
def _ids_of_word(word: str) -> tuple[int, ...]:
    return tuple(_encoded(word))


def _encoded(text: str) -> list[int]:
    ids: list[int] = _clip_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def in_chunks(ids: Sequence[int], pad_token_id: int, num_chunks: int) -> TokenizedCaption:
    """Return the ids of a text as `tokenize` arranges them."""
    kept = ids[: num_chunks * CHUNK_TOKENS]
    chunks = [
        _chunk(kept[first : first + CHUNK_TOKENS], pad_token_id)
        for first in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS)
    ]
    return TokenizedCaption(chunks, len(ids) - len(kept))


def _chunk(ids: Sequence[int], pad_token_id: int) -> list[int]:
    padding = [pad_token_id] * (CHUNK_TOKENS - len(ids))
    return [START_TOKEN, *ids, END_TOKEN, *padding]


def num_chunks_needed(caption: str) -> int:
    """Return how many chunks of 75 tokens the caption fills, at least one."""
    return max(1, -(-len(token_ids(caption)) // CHUNK_TOKENS))


def tokenize_captions(captions_l: Sequence[str], captions_g: Sequence[str], num_chunks: int) -> CaptionTokens:
    """Return token ids of B caption pairs, L padded with the end token and G with zero."""
    import torch

    return CaptionTokens(
        torch.tensor([tokenize(caption, PAD_L, num_chunks).ids for caption in captions_l]),
        torch.tensor([tokenize(caption, PAD_G, num_chunks).ids for caption in captions_g]),
    )
