"""The first part of the pretraining: a VAE that reconstructs drawn pictures, plain ones and patterned ones."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss
from tqdm import trange

from demo.pictures import PLAIN, SIZES, STYLES, draw, random_scene
from library.data.latent_preparation import pixels_to_tensor
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.latents import decode_latents, encode_pixels

CROP = 64
"""Side of the training pictures: parts of whole drawings, since the VAE looks at small surroundings only."""
BATCH_SIZE = 12
PEAK_RATE = 2.5e-3
KL_WEIGHT = 1e-4
"""Against a reconstruction error per pixel: enough that neighbouring latents look alike."""


def train_vae(vae: AutoencoderKL, num_steps: int, seed: int, save: Callable[[], None]) -> None:
    """Train in float32 with AdamW, the rate rising over 5% of the steps and falling to zero along a cosine.

    The loss is L1 and squared error of the reconstruction from a drawn latent, L1 of the differences between its
    colour channels (a picture without its colours is nearly right, and training would rest there for long), and the
    posterior's KL divergence.
    `save` is called now and then.
    """
    generator = random.Random(seed)
    torch.manual_seed(seed)  # what the posterior is drawn with
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, num_steps))
    vae.train()
    bar = trange(num_steps, desc="VAE", mininterval=10)
    for step in bar:
        pixels = torch.stack([_random_crop(generator) for _ in range(BATCH_SIZE)])
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        error = l1_loss(rebuilt, pixels) + mse_loss(rebuilt, pixels) + l1_loss(_tints(rebuilt), _tints(pixels))
        loss = error + KL_WEIGHT * posterior.kl().mean() / (CROP / 8) ** 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.4f}", l1=f"{l1_loss(rebuilt, pixels).item():.4f}")
        if step % 500 == 499:
            save()
    vae.eval()


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Rescale the VAE's 1x1 convolutions so that `LATENT_SCALE` times its latents of `pixels` has deviation 1, mean 0.

    Each channel z becomes (z - mean) / (deviation * LATENT_SCALE), and the decoder takes that back: what is
    reconstructed stays the same.
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
    outer.bias[channels:] -= 2 * stretch.log()  # of the logarithm of the variance


def signal_to_noise(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction of pixels in -1..1, in decibels."""
    rebuilt = decode_latents(vae, encode_pixels(vae, pixels)).clamp(-1, 1)
    return 10 * math.log10(4 / mse_loss(rebuilt, pixels).item())


def warm_cosine(step: int, num_steps: int) -> float:
    """The part of the peak rate at a step: a rise over 5% of the steps, then half a cosine down to zero."""
    warmup = 0.05 * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (num_steps - warmup))


def _tints(pixels: torch.Tensor) -> torch.Tensor:
    """Red less blue, green less red, blue less green: [B, 3, H, W]."""
    return pixels - pixels.roll(1, dims=1)


def _random_crop(generator: random.Random) -> torch.Tensor:
    """A part [3, CROP, CROP] of a random drawing, every other one plain, from a corner of a latent cell or not."""
    styles = (PLAIN,) if generator.random() < 0.4 else STYLES
    picture = draw(random_scene(generator, styles, generator.choice(SIZES)))
    left, top = (generator.randint(0, side - CROP) for side in picture.size)
    return pixels_to_tensor(np.array(picture.crop((left, top, left + CROP, top + CROP))))
