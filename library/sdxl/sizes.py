"""Sizes in pixels, and the grid of latent cells that SDXL's VAE lays over them."""

from typing import NamedTuple

PIXELS_PER_LATENT = 8
LATENT_CHANNELS = 4
MIN_SIDE = PIXELS_PER_LATENT
"""The smallest side of an image that is trained: one cell of its latents."""
MAX_SIDE = 16384
"""The largest side; a square of it has 16 times the pixels of 4096x4096."""
MAX_ASPECT = 100
"""How many times as long as wide an image may be."""


class Size(NamedTuple):
    """Width and height in pixels, in this order, as metadata files and flags write them."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height

    @property
    def is_trainable(self) -> bool:
        """Whether an image may be trained at this size."""
        short, long = sorted(self)
        return short >= MIN_SIDE and long <= MAX_SIDE and long <= MAX_ASPECT * short

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"
