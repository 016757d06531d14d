"""Pixels to latents and back, through the VAE."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL

from library.config.digests import digest
from library.sdxl.device_memory import bytes_to_decode, bytes_to_encode, free_bytes
from library.sdxl.sizes import PIXELS_PER_LATENT
from library.sdxl.tensor_file import raw_bytes

log = logging.getLogger(__name__)

TILE = 64
"""Latent cells along each side of a tile, if an image is decoded in tiles."""

Result = TypeVar("Result")


class EncodedPixels(NamedTuple):
    """Unscaled `latents` [B, 4, h, w] in float32; the samples encoded again in float32, and those that failed."""

    latents: torch.Tensor
    redone: list[int]
    failed: list[int]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return unscaled latents [B, 4, h, w] in float32 of pixels [B, 3, H, W] in -1..1, on the VAE's device.

    The mean of the posterior: kohya's trainers draw from it, but its deviation is far below what the U-Net can tell
    apart, and the mean makes cached and uncached training the same. A GPU without memory for a batch gets images
    one by one.
    """
    pixels = pixels.to(vae.device, vae.dtype)
    together = len(pixels) > 1 and not vae.use_slicing
    if together and not _fits(pixels.device, bytes_to_encode(vae, len(pixels) * pixels[0, 0].numel())):
        log.info("the GPU has no memory left for a batch of %d images: they are encoded one by one", len(pixels))
        vae.enable_slicing()
        together = False
    encoded = _unless_out_of_memory(lambda: vae.encode(pixels)) if together else None
    if encoded is None:
        if together:
            log.warning("out of memory for a batch of %d images: they are encoded one by one", len(pixels))
            vae.enable_slicing()
        encoded = vae.encode(pixels)
    return encoded.latent_dist.mean.float()


def encode_pixels_finite(vae: AutoencoderKL, pixels: torch.Tensor) -> EncodedPixels:
    """As `encode_pixels`; samples where the VAE's precision produces NaN or Inf are encoded again in float32."""
    latents = encode_pixels(vae, pixels)
    overflowed = _not_finite(latents)
    held = vae.dtype
    if not overflowed or held == torch.float32:
        return EncodedPixels(latents, [], overflowed)
    # torch's own `to`: that of diffusers warns at every change of precision.
    torch.nn.Module.to(vae, torch.float32)
    latents[overflowed] = encode_pixels(vae, pixels[overflowed])
    torch.nn.Module.to(vae, held)  # exact: every value of a narrower type survives the way through float32
    return EncodedPixels(latents, overflowed, _not_finite(latents))


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels [B, 3, H, W] in -1..1, float32, of unscaled latents [B, 4, h, w].

    Where the device has no memory for that, in tiles that overlap, which differ a little in brightness.
    """
    latents = latents.to(vae.device, vae.dtype)
    num_pixels = len(latents) * latents[0, 0].numel() * PIXELS_PER_LATENT**2
    decoded = None
    if _fits(vae.device, bytes_to_decode(vae, num_pixels)):
        decoded = _unless_out_of_memory(lambda: vae.decode(latents))
    if decoded is None:
        log.warning("the GPU has no memory to decode an image at once: it is decoded in tiles")
        with _tiles(vae):
            decoded = vae.decode(latents)
    return decoded.sample.float()


def vae_digest(vae: AutoencoderKL) -> str:
    """Return a fingerprint of the VAE's weights, compared in bfloat16, the coarsest precision that they are held in.

    The same in every precision that came straight from the file's without loss or by rounding to bfloat16. Weights of
    a float32 file that were rounded to float16 have another: take the digest before such a cast.
    """
    weights = sorted(vae.state_dict().items())
    named = ((name.encode(), raw_bytes(tensor.to("cpu", torch.bfloat16))) for name, tensor in weights)
    return digest(part for pair in named for part in pair).hex()


def _fits(device: torch.device, num_bytes: int) -> bool:
    free = free_bytes(device)
    return free is None or num_bytes <= free


def _unless_out_of_memory(compute: Callable[[], Result]) -> Result | None:
    """Return the result of `compute`, or None. What it held is freed with its exception, when this returns."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        return None


@contextmanager
def _tiles(vae: AutoencoderKL) -> Iterator[None]:
    """Decode in tiles within this context; those of diffusers are as large as the images of SDXL."""
    before = vae.tile_latent_min_size, vae.tile_sample_min_size
    vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, TILE * PIXELS_PER_LATENT
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = before


def _not_finite(latents: torch.Tensor) -> list[int]:
    return [index for index, sample in enumerate(latents) if not sample.isfinite().all()]
