"""A training set of random latents as prepare_buckets_latents.py would write it, without images."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from library.captions.final_captions import CaptionPair
from library.data.caption_tokens import tokenizer_for
from library.data.captioning import Captioning
from library.data.dataset import Batch, CaptionedImages
from library.data.epoch_order import MicroBatch
from library.data.latent_cache import CachedLatents, cache_path, write_cache
from library.data.subsets import Subset
from library.data.training_images import TrainingImage
from library.images.buckets import BucketRule
from library.images.crops import Crop
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

IMAGES_PER_BUCKET = 8


@dataclass(frozen=True)
class SyntheticSet:
    """Eight images in each bucket."""

    folder: Path
    buckets: tuple[Size, ...]

    @property
    def metadata(self) -> Path:
        """The file for `--in_json`."""
        return self.folder / "meta_lat.json"

    @property
    def images(self) -> Path:
        """The folder for `--train_data_dir`."""
        return self.folder / "images"

    def write(self) -> None:
        """Write metadata and latents."""
        self.images.mkdir(parents=True)
        random = np.random.default_rng(0)
        for image in self._training_images():
            assert isinstance(image.latents, Path)
            height, width = image.bucket.height // PIXELS_PER_LATENT, image.bucket.width // PIXELS_PER_LATENT
            # The standard deviation of the output of SDXL's VAE, which its scale brings to about 1.
            latents = random.normal(scale=8, size=(LATENT_CHANNELS, height, width)).astype(np.float32)
            whole = (0.0, 0.0, float(image.bucket.width), float(image.bucket.height))
            write_cache(image.latents, CachedLatents(latents, image.bucket, whole, resized_size=image.bucket))
        entries = {
            image.key: {
                "captionG": image.captions.variants_g[0],
                "captionL": image.captions.variants_l[0],
                "train_resolution": list(image.bucket),
            }
            for image in self._training_images()
        }
        self.metadata.write_text(json.dumps(entries), encoding="utf-8")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches without end, bucket after bucket, each read when it is needed."""
        images = list(self._training_images())
        dataset = CaptionedImages(
            images, Captioning(tokenizer_for(image.subset for image in images), seed=0, num_steps=1)
        )
        for first in cycle(range(0, len(self.buckets) * IMAGES_PER_BUCKET, IMAGES_PER_BUCKET)):
            indices = tuple(first + index % IMAGES_PER_BUCKET for index in range(batch_size))
            yield dataset[
                MicroBatch(
                    indices,
                    occurrences=(0,) * batch_size,
                    flips=(False,) * batch_size,
                    epoch=1,
                    steps_done=0,
                    loss_scale=1 / batch_size,
                    completes_step=True,
                )
            ]

    def _training_images(self) -> Iterator[TrainingImage]:
        for bucket in self.buckets:
            for index in range(IMAGES_PER_BUCKET):
                key = f"{bucket}_{index}"
                yield TrainingImage(
                    key=key,
                    captions=CaptionPair(
                        (f"photographic, soft light, image {index}",),
                        (f"a woman in nature looks to the left, trees behind her, {key}",),
                    ),
                    subset=Subset(self.images, self.metadata, BucketRule(bucket, 64, 64, 64, False, enabled=False)),
                    size=bucket,
                    bucket=bucket,
                    crop=Crop(0, 0, 0),
                    latents=cache_path(self.images / f"{key}.png"),
                )
