"""How much of a final text an encoder reads: its tokens, and the words that the limit cuts off."""

from collections.abc import Callable
from typing import NamedTuple

from library.captions.rules import CaptionRules
from library.sdxl.prompt_weights import weighted_token_ids
from library.sdxl.tokenizers import token_ids


class Reading(NamedTuple):
    """A final text as an encoder reads it: the words that fit, what is cut off, all its tokens, and the limit."""

    kept: str
    cut: str
    num_tokens: int
    limit: int


def reading(text: str, rules: CaptionRules) -> Reading:
    """Return how an encoder with these rules reads a final text. Raise `UserError` for a weight that is no number."""
    num_tokens, limit = count_tokens(text, rules), rules.max_token_length
    kept = text
    if num_tokens > limit:
        kept = fitting_beginning(text, limit, lambda beginning: count_tokens(beginning, rules))
    return Reading(kept, text[len(kept) :], num_tokens, limit)


def count_tokens(text: str, rules: CaptionRules) -> int:
    """Return how many tokens a final text has, those that are cut included. Raise as `reading`."""
    return len(weighted_token_ids(text)[0] if rules.weighted_captions else token_ids(text))


def fitting_beginning(text: str, limit: int, num_tokens: Callable[[str], int]) -> str:
    """Return the longest beginning of a text, in whole words, that has at most `limit` tokens."""
    words = text.split(" ")
    fit, too_many = 0, len(words) + 1
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if num_tokens(" ".join(words[:middle])) <= limit:
            fit = middle
        else:
            too_many = middle
    return " ".join(words[:fit])
