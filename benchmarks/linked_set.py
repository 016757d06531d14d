"""A prepared training set of any size: metadata, and images with latents that are links to a few files."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from library.config.digests import file_digest
from library.data.latent_cache import CachedLatents, write_cache
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

BUCKETS = (Size(96, 96), Size(128, 64))
LINKS_OF_A_FILE = 10_000  # file systems allow some ten thousand
_SUFFIXES = (".png", ".npz")


def write_linked_set(folder: Path, num_images: int, vae_digest: str, *, num_files: int = 0) -> None:
    """Write `meta_lat.json` and `images` into `folder`; two thirds of the images are square.

    At least `num_files` files of latents are written, so that reading them is not reading one file.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    links = min(LINKS_OF_A_FILE, max(1, num_images // max(1, num_files)))
    with (folder / "meta_lat.json").open("w", encoding="utf-8") as metadata:
        metadata.write("{")
        for number in range(num_images):
            bucket = BUCKETS[number % 3 == 2]
            original = folder / f"{bucket}-{number // 3 // links}"
            if not original.with_suffix(".npz").exists():
                _write_image(original, bucket, vae_digest)
            for suffix in _SUFFIXES:
                os.link(original.with_suffix(suffix), images / f"{number:07}{suffix}")
            entry = {
                "captionG": f"a woman in nature, trees behind her, number {number}",
                "captionL": f"photographic, soft light, {number}",
                "train_resolution": list(bucket),
            }
            metadata.write(f'{"," if number else ""}\n  "{number:07}": {json.dumps(entry)}')
        metadata.write("\n}\n")


def _write_image(stem: Path, bucket: Size, vae_digest: str) -> None:
    image = stem.with_suffix(".png")
    Image.new("RGB", bucket).save(image)
    height, width = bucket.height // PIXELS_PER_LATENT, bucket.width // PIXELS_PER_LATENT
    random = np.random.default_rng([*stem.name.encode()])
    # The standard deviation of the output of SDXL's VAE, which its scale brings to about 1.
    latents = random.normal(scale=8, size=(LATENT_CHANNELS, height, width)).astype(np.float32)
    whole = (0.0, 0.0, float(bucket.width), float(bucket.height))
    cached = CachedLatents(
        latents, bucket, whole, resized_size=bucket, image_digest=file_digest(image), vae_digest=vae_digest
    )
    write_cache(stem.with_suffix(".npz"), cached)
