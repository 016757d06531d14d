"""Which captions are longer than the encoders are going to read."""

from collections.abc import Mapping, Sequence

from library.data.training_set import TrainingImage
from library.sdxl.tokenizers import CHUNK_TOKENS, PAD_G, PAD_L, tokenize

MAX_CHUNKS = 3
"""Chunks of the longest --max_token_length."""

_NAMES_SHOWN = 3


def cut_captions(images: Sequence[TrainingImage], num_chunks: int) -> list[str]:
    """For each encoder with captions that do not fit into `num_chunks`: how many, the longest ones, and the remedy."""
    cut_l = {image.key: tokenize(image.caption_l, PAD_L, num_chunks).num_truncated for image in images}
    cut_g = {image.key: tokenize(image.caption_g, PAD_G, num_chunks).num_truncated for image in images}
    return [_sentence(name, cut, num_chunks) for name, cut in (("L", cut_l), ("G", cut_g)) if any(cut.values())]


def _sentence(encoder: str, num_cut: Mapping[str, int], num_chunks: int) -> str:
    """`num_cut` has the number of tokens that each image's caption loses."""
    num_kept = num_chunks * CHUNK_TOKENS
    longest_first = sorted((key for key, cut in num_cut.items() if cut), key=lambda key: -num_cut[key])
    shown = ", ".join(f"{key} ({num_kept + num_cut[key]})" for key in longest_first[:_NAMES_SHOWN])
    more = f" and {len(longest_first) - _NAMES_SHOWN} more" if len(longest_first) > _NAMES_SHOWN else ""
    return (
        f"{len(longest_first)} of {len(num_cut)} {encoder} captions have more than {num_kept} tokens and lose the rest:"
        f" {shown}{more}. {_remedy(num_kept + num_cut[longest_first[0]], num_chunks)}"
    )


def _remedy(num_tokens: int, num_chunks: int) -> str:
    """What to do about a longest caption of `num_tokens`."""
    if num_chunks == MAX_CHUNKS:
        return "Shorten them."
    num_needed = min(-(-num_tokens // CHUNK_TOKENS), MAX_CHUNKS)
    return f"Shorten them, or give --max_token_length={num_needed * CHUNK_TOKENS}."
