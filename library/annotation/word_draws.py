"""Words drawn by their probability, where the draw for an image depends on seed and image alone.

transformers draws for a whole batch from one generator: what an image would be told depended on its neighbours, and on
what ran before. Here the number behind each word is a hash, as it is for everything random in training.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from library.config.digests import digest

_BITS = 53  # of a float64 between 0 and 1


def drawn_number(seed: int, key: str, position: int) -> float:
    """Return a number from 0 to 1 (not included) for the word at one position of the caption of one image."""
    number = int.from_bytes(digest([f"{seed}/{key}/{position}".encode(errors="surrogatepass")], 8), "little")
    return (number >> (64 - _BITS)) / 2**_BITS


class WordDraws(LogitsProcessor):
    """Leaves one word for each image of a batch, drawn by the probabilities that the processors before it left."""

    def __init__(self, seed: int, keys: Sequence[str]):
        self._seed = seed
        self._keys = list(keys)
        self._position = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [B, V] with all words but the drawn ones impossible."""
        numbers = [drawn_number(self._seed, key, self._position) for key in self._keys]
        self._position += 1
        sums = scores.double().softmax(-1).cumsum(-1)
        wanted = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * sums[:, -1:]
        chosen = (sums <= wanted).sum(-1, keepdim=True)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, chosen, 0.0)
