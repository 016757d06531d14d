"""A training set in the making: pictures, caches and metadata of one test."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from library.config.digests import file_digest
from library.data.latent_cache import CachedLatents, cache_path, write_cache
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.sizes import Size
from tests.training_images import read_set


@dataclass(frozen=True)
class TrainingFolder:
    """A folder of pictures of `size`, for which the metadata chooses `bucket` and `rule` would choose another one."""

    path: Path
    size: ClassVar[Size] = Size(100, 60)
    bucket: ClassVar[Size] = Size(80, 48)
    rule: ClassVar[BucketRule] = BucketRule(Size(64, 64), 64, 128, 32, no_upscale=False)

    @property
    def images(self) -> Path:
        return self.path / "my images"

    def add(self, name="a.png", size=size):
        """Save a picture of noise, another one for each name."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size.height, size.width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    def add_cache(self, image, bucket=bucket, **changes):
        """The cache of a picture as prepare_buckets_latents.py would leave it; changes as of its fields."""
        cached = CachedLatents(
            latents=np.random.default_rng(0).normal(size=(4, bucket.height // 8, bucket.width // 8)).astype(np.float32),
            original_size=self.size,
            crop_ltrb=(0.0, 0.0, 80.0, 48.0),
            resized_size=self.bucket,
            image_digest=file_digest(image) if image.exists() else "gone",
            vae_digest="vae",
        )
        write_cache(cache_path(image), replace(cached, **changes))
        return cache_path(image)

    @staticmethod
    def entry(resolution=None, caption_l="style", caption_g="content"):
        """The metadata of one image."""
        made = {"captionL": caption_l, "captionG": caption_g}
        return made if resolution is None else made | {"train_resolution": list(resolution)}

    def options(self, metadata, **flags):
        """Options that name this folder and the metadata: keys alone, or keys with their entries."""
        entries = metadata if isinstance(metadata, dict) else {str(key): self.entry() for key in metadata}
        (self.path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
        return TrainingSetOptions(train_data_dir=self.images, in_json=self.path / "meta.json", **flags)

    def read(self, metadata, **flags):
        """The training set, for the VAE that `add_cache` names."""
        return self.read_with(self.options(metadata, **flags), "vae")

    def read_with(self, options, digest):
        """The training set of `options`, for the VAE of `digest`."""
        return read_set(options, self.rule, digest)


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    made = TrainingFolder(tmp_path / "my set ü")
    made.images.mkdir(parents=True)
    return made


@pytest.fixture
def write_metadata_file(tmp_path: Path):
    """`write_metadata_file(name, bytes or text)` returns the path of the file."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / "my set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
