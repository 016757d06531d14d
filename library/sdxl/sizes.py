"""Sizes in pixels, and the grid of latent cells that SDXL's VAE lays over them."""

from typing import NamedTuple

PIXELS_PER_LATENT = 8
LATENT_CHANNELS = 4


class Size(NamedTuple):
    """Width and height in pixels, in this order, as metadata files and flags write them."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"
