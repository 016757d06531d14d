"""A net with the kinds of weights that optimizers tell apart."""

import torch
from torch import nn


class SmallNet(nn.Module):
    """A convolution and linear layers, of which one is used twice; the same weights each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [B, 16] of images [B, 3, H, W]."""
        features = self.first(self.convolution(images).mean(dim=(2, 3)).relu())
        return self.twice(self.twice(features).relu())
