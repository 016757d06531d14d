"""Comparison 7: latents of the cache against diffusers' VAE, and cached against uncached batches.

(That they are multiplied by 0.13025 where they are used is part of comparison 4, whose plain step does just that.)
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import prepare_buckets_latents
from library.data.dataset import CaptionedImages
from library.data.latent_preparation import encode_missing
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.latents import vae_digest
from library.sdxl.sizes import Size
from library.training.preparation import latents_of
from tests.conftest import BUCKET_FLAGS, PreparedSet
from tests.training_images import captioned, micro_batch, read_set

RULE = BucketRule(Size(128, 128), 64, 256, 64, no_upscale=False)


def test_the_cache_holds_the_mean_of_diffusers_posterior_unscaled(tiny_sdxl: Path, diffusers_model, tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8)  # neither shrunk nor cropped
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a": {"captionG": "", "captionL": ""}}), encoding="utf-8")
    argv = [tmp_path, tmp_path / "captions.json", tmp_path / "latents.json", tiny_sdxl, "--max_resolution=128,128"]
    assert prepare_buckets_latents.main([*map(str, argv), *BUCKET_FLAGS, "--flip_aug"]) == 0
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with np.load(tmp_path / "a.npz") as file, torch.no_grad():
        for name, tensor in (("latents", pixels), ("latents_flipped", pixels.flip(3))):
            expected = diffusers_model.vae.encode(tensor).latent_dist.mean[0]
            assert torch.equal(torch.from_numpy(file[name]), expected), name


@pytest.fixture(scope="module")
def training_sets(two_buckets: PreparedSet, diffusers_model, tmp_path_factory) -> dict[str, CaptionedImages]:
    """The same pictures in every way that the trainer can get their latents."""
    vae, digest = diffusers_model.vae, vae_digest(diffusers_model.vae)
    fresh = two_buckets.without_latents(tmp_path_factory.mktemp("fresh") / "set")

    def read(folder: PreparedSet, metadata: Path, **flags: bool) -> CaptionedImages:
        options = TrainingSetOptions(folder.images, metadata, enable_bucket=True, **flags)
        images = read_set(options, RULE, digest)
        if options.cache_latents or options.cache_latents_to_disk:
            images = encode_missing(images, vae, options, digest=digest)
        return captioned(images)

    return {
        "encoded in the step": read(fresh, fresh.captions_json, flip_aug=True),
        "cached in memory": read(fresh, fresh.captions_json, flip_aug=True, cache_latents=True),
        "cached in files": read(fresh, fresh.captions_json, flip_aug=True, cache_latents_to_disk=True),
        "prepared by the script": read(two_buckets, two_buckets.latents_json),
    }


def single_batches(pictures: CaptionedImages, vae, *, mirrored: bool) -> dict[str, list[torch.Tensor]]:
    """By image: the unscaled latents that a step works on, and all else that it is given."""
    batches = {}
    for index in range(len(pictures)):
        batch = pictures[micro_batch([index], [mirrored])]
        sizes = [batch.original_sizes, batch.crop_top_lefts, batch.target_sizes]
        batches[batch.keys[0]] = [latents_of(batch, vae), *batch.tokens, *sizes]
    return batches


@pytest.mark.parametrize(
    ("kind", "mirrored"),
    [
        ("cached in memory", False),
        ("cached in memory", True),
        ("cached in files", False),
        ("cached in files", True),
        ("prepared by the script", False),
    ],
)
def test_a_step_sees_the_same_picture_cached_and_uncached(kind: str, mirrored: bool, training_sets, diffusers_model):
    vae = diffusers_model.vae
    cached = single_batches(training_sets[kind], vae, mirrored=mirrored)
    uncached = single_batches(training_sets["encoded in the step"], vae, mirrored=mirrored)
    assert all(image.has_latents for image in training_sets[kind].images)
    assert not any(image.has_latents for image in training_sets["encoded in the step"].images)
    assert cached.keys() == uncached.keys()
    assert len(cached) == 8
    for key, tensors in uncached.items():
        # Exact: the VAE sees the same pixels, one picture at a time.
        assert all(torch.equal(one, other) for one, other in zip(cached[key], tensors, strict=True)), key
