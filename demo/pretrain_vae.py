"""Pretraining, part one: a VAE that reconstructs drawn images of all styles."""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss
from tqdm import trange

from demo.pictures import PLAIN, SIZES, STYLES, draw, random_scene
from library.data.latent_preparation import pixels_to_tensor
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.latents import decode_latents, encode_pixels
from library.sdxl.sizes import PIXELS_PER_LATENT

NUM_DRAWINGS = 2000
CROPS = ((0.6, 32, 16), (1.0, 64, 6))
"""Stages of the training: fraction of the steps at which a stage ends, side of its crops in pixels, batch size.

The VAE sees small neighbourhoods only, so that it learns most from many small parts of drawings.
"""
PEAK_RATE = 1.5e-3
KL_WEIGHT = 1e-4
"""Weight of the divergence of a latent cell relative to the error of a pixel: enough to make the latents smooth."""
HINT_WEIGHT = 0.1
HINT_SCALE = 2.0


def train_vae(vae: AutoencoderKL, num_steps: int, seed: int) -> None:
    """Train in float32 with AdamW, with a warm-up over 5% of the steps and a cosine decay to zero.

    The loss is the error of the reconstruction from a sampled latent (`reconstruction_error`), the posterior's KL
    divergence, and a hint that pulls three of the four channels towards the mean colour of their cell. Without the hint
    and `pass_colours_on`, a network so small learns only shades of grey for thousands of steps.
    """
    generator = random.Random(seed)
    torch.manual_seed(seed)  # samples of the posterior
    pass_colours_on(vae)
    drawings = [_drawing(generator) for _ in range(NUM_DRAWINGS)]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step / num_steps))
    vae.train()
    bar = trange(num_steps, desc="VAE", mininterval=10)
    for step in bar:
        side, batch_size = next(crop[1:] for crop in CROPS if step < crop[0] * num_steps)
        pixels = torch.stack([_random_crop(generator, drawings, side) for _ in range(batch_size)])
        posterior = vae.encode(pixels).latent_dist
        error = reconstruction_error(vae.decode(posterior.sample()).sample, pixels)
        hint = mse_loss(posterior.mean[:, :3], HINT_SCALE * avg_pool2d(pixels, PIXELS_PER_LATENT))
        divergence = posterior.kl().mean() / (side / PIXELS_PER_LATENT) ** 2
        loss = error + KL_WEIGHT * divergence + HINT_WEIGHT * hint
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(error=f"{error.item():.4f}", hint=f"{hint.item():.4f}", refresh=False)
    vae.eval()


def reconstruction_error(rebuilt: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return squared error, plus half the L1 error, plus squared error of the differences between colour channels."""
    tints, rebuilt_tints = (each - each.roll(1, dims=1) for each in (pixels, rebuilt))
    return mse_loss(rebuilt, pixels) + 0.5 * l1_loss(rebuilt, pixels) + mse_loss(rebuilt_tints, tints)


@torch.no_grad()
def pass_colours_on(vae: AutoencoderKL) -> None:
    """Initialize a new VAE so that brightness and two colour differences pass through it from the first step.

    The convolutions between residual blocks start as the identity (or as means of 2x2 pixels), the blocks add nothing
    yet, and the first convolution computes brightness and amplified colour differences.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, ResnetBlock2D):
            nn.init.zeros_(layer.conv2.weight)
        elif isinstance(layer, nn.Conv2d) and any(part in name for part in _PASSING_LAYERS):
            _pass_on(layer, halves="downsamplers" in name)
    first = vae.encoder.conv_in
    nn.init.zeros_(first.bias)
    first.weight[:3] = 0
    first.weight[:3, :, 1, 1] = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [2.0, -2.0, 0.0], [-1.0, -1.0, 2.0]])


_PASSING_LAYERS = ("shortcut", "upsamplers", "downsamplers", "decoder.conv_in", "quant_conv")


def _pass_on(layer: nn.Conv2d, *, halves: bool) -> None:
    """Map each channel to the channel of the same number; `halves`: a layer of stride 2, which computes means."""
    num_channels = min(layer.in_channels, layer.out_channels)
    middle = layer.kernel_size[0] // 2
    layer.weight[:num_channels] = 0
    for channel in range(num_channels):
        if halves:
            layer.weight[channel, channel, :2, :2] = 0.25
        else:
            layer.weight[channel, channel, middle, middle] = 1
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Rescale the VAE's 1x1 convolutions so that `LATENT_SCALE` times its latents of `pixels` has deviation 1, mean 0.

    Each channel z becomes (z - mean) / (deviation * LATENT_SCALE), and the decoder inverts it: the reconstruction stays
    the same.
    """
    latents = encode_pixels(vae, pixels)
    mean = latents.mean(dim=(0, 2, 3))
    stretch = latents.std(dim=(0, 2, 3)) * LATENT_SCALE
    outer, inner = vae.quant_conv, vae.post_quant_conv
    assert outer is not None and inner is not None and outer.bias is not None and inner.bias is not None
    channels = len(mean)
    inner.bias += inner.weight[:, :, 0, 0] @ mean
    inner.weight *= stretch[None, :, None, None]
    outer.bias[:channels] -= mean
    outer.weight[:channels] /= stretch[:, None, None, None]
    outer.bias[:channels] /= stretch
    outer.bias[channels:] -= 2 * stretch.log()  # the logarithm of the variance


def signal_to_noise(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of the reconstruction of pixels in -1..1, in decibels."""
    rebuilt = decode_latents(vae, encode_pixels(vae, pixels)).clamp(-1, 1)
    return 10 * math.log10(4 / mse_loss(rebuilt, pixels).item())


def warm_cosine(done: float) -> float:
    """Return the fraction of the peak rate at the fraction `done` of training: warm-up to 5%, then half a cosine."""
    warmup = 0.05
    return 0.02 + done / warmup * 0.98 if done < warmup else 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / 0.95)


def _drawing(generator: random.Random) -> torch.Tensor:
    """Return a random drawing [3, H, W] in -1..1; four of ten are plain."""
    styles = (PLAIN,) if generator.random() < 0.4 else STYLES
    return pixels_to_tensor(np.array(draw(random_scene(generator, styles, generator.choice(SIZES)))))


def _random_crop(generator: random.Random, drawings: Sequence[torch.Tensor], side: int) -> torch.Tensor:
    """Return a crop [3, side, side] of one of the drawings."""
    drawing = generator.choice(drawings)
    top, left = (generator.randint(0, length - side) for length in drawing.shape[1:])
    return drawing[:, top : top + side, left : left + side]
