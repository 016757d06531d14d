"""How much memory a device has left, and how much the VAE takes there."""

import torch
from diffusers import AutoencoderKL

_DECODING, _ENCODING = 768, 640
"""Numbers that SDXL's VAE holds for each pixel at its peak: 3.0 and 2.5 GiB for 1024x1024 in float32 (rehearsed)."""
_USUAL_WIDTH = 128


def free_bytes(device: torch.device) -> int | None:
    """Return what torch can still allocate on a GPU, None for other devices, which are not asked."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_to_decode(vae: AutoencoderKL, num_pixels: int) -> int:
    """Return the peak of memory for decoding so many pixels at once, beside the weights."""
    return _bytes(vae, num_pixels, _DECODING)


def bytes_to_encode(vae: AutoencoderKL, num_pixels: int) -> int:
    """Return the peak of memory for encoding so many pixels at once, beside the weights."""
    return _bytes(vae, num_pixels, _ENCODING)


def _bytes(vae: AutoencoderKL, num_pixels: int, numbers_a_pixel: int) -> int:
    width = vae.config.block_out_channels[0] / _USUAL_WIDTH
    return int(numbers_a_pixel * width * num_pixels * vae.dtype.itemsize)
