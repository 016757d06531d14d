"""The six sizes that SDXL is conditioned on (SDXL paper, section 2.2: micro-conditioning)."""

import torch


def size_conditioning(
    original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_sizes: torch.Tensor
) -> torch.Tensor:
    """Return diffusers' `time_ids` [B, 6]: original height and width, crop top and left, target height and width.

    Each argument is [B, 2], height (top) first. The U-Net makes 256 sinusoids of each number. float32 whatever the
    U-Net's precision is: bfloat16 has no 1001.
    """
    return torch.cat([original_sizes, crop_top_lefts, target_sizes], dim=1).float()
