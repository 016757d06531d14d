"""A prepared training set of any size: metadata, and images with latents that are links to a few files."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from library.config.digests import file_digest
from library.data.columns import Texts
from library.data.latent_cache import CachedLatents, read_cache, read_with_place, write_cache
from library.data.latent_entries import Entries, states_of
from library.data.latent_index import index_beside, write_index
from library.data.latent_shards import shards_path
from library.data.shard_writing import ROWS, Member, write_manifest, write_shard
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

BUCKETS = (Size(96, 96), Size(128, 64))
LINKS_OF_A_FILE = 10_000  # file systems allow some ten thousand
_SUFFIXES = (".png", ".npz")


def write_linked_set(
    folder: Path, num_images: int, vae_digest: str, *, num_files: int = 0, in_shards: bool = False
) -> None:
    """Write `meta_lat.json` and `images` into `folder`; two thirds of the images are square.

    At least `num_files` files of latents are written, so that reading them is not reading one file. With `in_shards`
    the latents are in shards, and not linked.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    links = links_of_a_file(num_images, num_files)
    with (folder / "meta_lat.json").open("w", encoding="utf-8") as metadata:
        metadata.write("{")
        for number in range(num_images):
            bucket = BUCKETS[number % 3 == 2]
            original = folder / f"{bucket}-{number // 3 // links}"
            if not original.with_suffix(".npz").exists():
                _write_image(original, bucket, vae_digest)
            for suffix in _SUFFIXES[: 1 if in_shards else None]:
                os.link(original.with_suffix(suffix), images / f"{number:07}{suffix}")
            entry = {
                "captionG": f"a woman in nature, trees behind her, number {number}",
                "captionL": f"photographic, soft light, {number}",
                "train_resolution": list(bucket),
            }
            metadata.write(f'{"," if number else ""}\n  "{number:07}": {json.dumps(entry)}')
        metadata.write("\n}\n")
    if in_shards:
        _write_shards(folder, num_images, links)


def write_index_of(folder: Path, num_images: int) -> None:
    """Write the index of a linked set, as a start that reads every image would, from its few files."""
    kinds = {path.stem: path for path in folder.glob("*.npz")}
    paths = list(kinds.values())
    images = Texts.of(str(path.with_suffix(".png")) for path in paths)
    entries = Entries(folder / "none", folder, Texts.of(map(str, paths)), images, Texts.same("", len(paths)))
    for row, path in enumerate(paths):
        cached, place = read_with_place(path)
        entries.note(row, cached, place, states_of(path.with_suffix(".png"), None))
    row_of = {stem: row for row, stem in enumerate(kinds)}
    links = links_of_a_file(num_images, 0)
    rows = [row_of[f"{BUCKETS[number % 3 == 2]}-{number // 3 // links}"] for number in range(num_images)]
    names = Texts.of(f"{number:07}.npz" for number in range(num_images))
    write_index(index_beside(folder / "meta_lat.json"), names, entries.entries[rows], entries.texts)


def links_of_a_file(num_images: int, num_files: int) -> int:
    """Return how many images share a file."""
    return min(LINKS_OF_A_FILE, max(1, num_images // max(1, num_files)))


def _write_shards(folder: Path, num_images: int, links: int) -> None:
    shards, names = shards_path(folder / "meta_lat.json"), []
    shards.mkdir()
    cached = {path.stem: read_cache(path) for path in folder.glob("*.npz")}
    for bucket in BUCKETS:
        numbers = [number for number in range(num_images) if BUCKETS[number % 3 == 2] == bucket]
        for first in range(0, len(numbers), ROWS):
            part = numbers[first : first + ROWS]
            members = [Member(f"{number:07}", cached[f"{bucket}-{number // 3 // links}"]) for number in part]
            names.append(write_shard(shards, members, torch.float32).name)
    write_manifest(shards, names)


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
