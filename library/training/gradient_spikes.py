"""Which gradient norms are spikes: those far above the running mean of the norms before them."""

import math

SPIKE = 10.0
"""A gradient norm is a spike if it is this many times the running mean of those before it."""

_MEMORY = 0.98  # how slowly the running mean forgets


class NormMean:
    """The running mean of gradient norms."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def times_usual(self, norm: float) -> float | None:
        """Take a norm in; return how many times the mean before it is, None if that is no spike."""
        before = self._mean
        if not math.isfinite(norm):
            return None
        self._mean = norm if before is None else _MEMORY * before + (1 - _MEMORY) * norm
        return norm / before if before is not None and norm > SPIKE * before else None
