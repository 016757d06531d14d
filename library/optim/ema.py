"""Moving averages of weights: updated in one pass over memory, and lent to the networks without a second copy.

`torch.optim.swa_utils` and diffusers' `EMAModel` compute the same averages; they keep them in the precision of the
weights, in which the small steps of an average in bfloat16 round to none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.config.digests import digest
from library.optim.ema_profiles import Profile
from library.optim.kernels import compiled
from library.optim.rounding import seed_of_part, stochastically_rounded
from library.sdxl.device_copies import HostCopy

_PIECE = 2**18
"""Elements that are exchanged at once: what is needed beside the weights stays in the processor's cache."""
_PIECE_OF_GPU = 2**22
"""The same on a GPU, which has fewer launches then."""


class MovingAverage:
    """The average of `weights` (contiguous tensors that change in place), in `dtype` on `device`.

    `begun` is the step whose weights it began with, `step` that of its last update. Where `dtype` is bfloat16 it is
    rounded stochastically, by a hash of `seed`, step and place: a resumed run rounds as one that was never stopped.
    Of weights that are parts, `first_elements` has the places of their first numbers in the whole.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        profile: Profile,
        dtype: torch.dtype,
        device: torch.device,
        seed: str,
        first_elements: Sequence[int] | None = None,
    ):
        self.begun = self.step = 0
        self.values = [torch.empty_like(each, dtype=dtype, device=device, requires_grad=False) for each in weights]
        self._weights = [each.detach() for each in weights]
        self._profile = profile
        self._seed = seed
        self._first_elements = first_elements or [0] * len(weights)

    def begin(self, step: int) -> None:
        """Begin with the weights after `step`; they count until the first update, which replaces them."""
        self.begun = self.step = step
        for average, weights in zip(self.values, self._weights, strict=True):
            average.copy_(weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step`, for all steps since the last update."""
        fraction = 1.0 - self._profile.kept(self.step - self.begun, step - self.begun)
        self.step = step
        pairs = list(zip(self.values, self._weights, strict=True))
        if all(average.dtype == weights.dtype == torch.float32 for average, weights in pairs) and all(
            _are_together(*pair) for pair in pairs
        ):
            torch._foreach_lerp_(self.values, self._weights, fraction)
            return
        for place, (average, weights) in enumerate(_brought_together(pairs)):
            seed = self._seed_of(step, place) if average.dtype == torch.bfloat16 else None
            _blend(average.view(-1), weights.view(-1), fraction, seed)

    @contextmanager
    @torch.no_grad()
    def lent(self) -> Iterator[None]:
        """Within the block the networks have the average as their weights; after it their own, bit for bit.

        Weights and average change places. No more memory is needed, but for float32 weights with an average in
        bfloat16: they wait in host memory.
        """
        lent: list[tuple[Tensor, Tensor, Tensor | None]] = []
        try:
            for average, weights in zip(self.values, self._weights, strict=True):
                waiting = None if _can_exchange(average, weights) else weights.to("cpu", copy=True)
                _lend(average, weights, waiting)
                lent.append((average, weights, waiting))
            yield
        finally:
            for average, weights, waiting in lent:
                _take_back(average, weights, waiting)

    def _seed_of(self, step: int, place: int) -> int:
        seed = int.from_bytes(digest([f"{self._seed}/{step}/{place}".encode()], 4), "little", signed=True)
        return seed_of_part(seed, self._first_elements[place])


@compiled
def _blend(average: Tensor, weights: Tensor, fraction: float, seed: int | None) -> None:
    """Move `average` [n] towards `weights` [n] by `fraction` of the way, in place and in one pass."""
    values = average.float()
    values = values + fraction * (weights.float() - values)
    average.copy_(values if seed is None else stochastically_rounded(values, seed))


def _are_together(average: Tensor, weights: Tensor) -> bool:
    return average.device == weights.device


def _brought_together(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield averages and their weights on one device, copied one ahead where the averages are in host memory."""
    coming: list[tuple[Tensor, HostCopy]] = []
    for average, weights in pairs:
        if _are_together(average, weights):
            yield average, weights
            continue
        coming.append((average, HostCopy(weights)))
        if len(coming) > 1:
            arrived, copy = coming.pop(0)
            yield arrived, copy.wait()
    for arrived, copy in coming:
        yield arrived, copy.wait()


# -- weights and average in exchanged places --------------------------------------------------------------------------


def _can_exchange(average: Tensor, weights: Tensor) -> bool:
    return average.dtype == weights.dtype or (average.dtype, weights.dtype) == (torch.float32, torch.bfloat16)


def _lend(average: Tensor, weights: Tensor, waiting: Tensor | None) -> None:
    """Put the average into `weights`, and the weights into the memory of the average unless they are `waiting`.

    A float32 average shown in bfloat16 needs half of its bits there; the other half of its memory holds the weights.
    """
    if waiting is not None:
        weights.copy_(average)
        return
    for kept, shown in _pieces(average, weights):
        own = shown.to(kept.device, copy=True)
        if kept.dtype == shown.dtype:
            _exchange(kept, shown, own)
            continue
        bits = kept.view(torch.int32)
        shown.copy_(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))  # rounded half away from zero
        bits.copy_((own.view(torch.int16).to(torch.int32) << 16) | (bits & 0xFFFF))


def _take_back(average: Tensor, weights: Tensor, waiting: Tensor | None) -> None:
    """Undo `_lend`."""
    if waiting is not None:
        weights.copy_(waiting)
        return
    for kept, shown in _pieces(average, weights):
        lent = shown.to(kept.device, copy=True)
        if kept.dtype == shown.dtype:
            _exchange(kept, shown, lent)
            continue
        bits = kept.view(torch.int32)
        low = bits & 0xFFFF
        shown.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
        bits.copy_(((lent.view(torch.int16).to(torch.int32) - (low >> 15)) << 16) | low)


def _exchange(kept: Tensor, shown: Tensor, copy_of_shown: Tensor) -> None:
    shown.copy_(kept)
    kept.copy_(copy_of_shown)


def _pieces(average: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = _PIECE if average.device.type == "cpu" else _PIECE_OF_GPU
    return zip(average.view(-1).split(size), weights.view(-1).split(size), strict=True)
