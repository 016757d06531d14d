"""Before training each file is opened once: metadata, caches, and each folder is listed once."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.caption_tokens import cut_captions, tokenizer_for
from library.data.fingerprints import Fingerprints
from library.data.latent_preparation import encode_missing
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import vae_digest
from tests.training_images import read_set

_counters: list[Counter[str]] = []


def _count(event: str, arguments: tuple) -> None:
    if _counters and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, Path)):
        _counters[-1][str(arguments[0])] += 1


@contextmanager
def counting_reads() -> Iterator[Counter[str]]:
    """Within the block, count how often each path is opened (to read or to write) or listed."""
    if not getattr(counting_reads, "is_hooked", False):
        sys.addaudithook(_count)  # cannot be removed again
        counting_reads.is_hooked = True
    _counters.append(Counter())
    try:
        yield _counters[-1]
    finally:
        _counters.pop()


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return read_vae(tiny_sdxl, torch.float32)


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_a_training_set_with_latents_is_read_once(folder, kind):
    facts = {} if kind == "ours" else {"image_digest": None, "vae_digest": None, "resized_size": None}
    images = [folder.add(f"{name}.png") for name in ("a", "b", "deep/c")]
    caches = [folder.add_cache(image, **facts) for image in images]
    options = folder.options(["a", "b", "c"])
    with counting_reads() as reads:
        found = read_set(options, folder.rule, "vae")
        Fingerprints(found)
        cut_captions(found, tokenizer_for(image.subset for image in found))
    assert [reads[str(path)] for path in (options.in_json, folder.images, folder.images / "deep")] == [1, 1, 1]
    assert [reads[str(cache)] for cache in caches] == [1, 1, 1]
    assert [reads[str(image)] for image in images] == [1 if kind == "ours" else 0] * 3  # to compare its digest


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_latents_that_are_made_before_training_are_not_read_back(folder, vae, on_disk):
    images = [folder.add(f"{name}.png") for name in "ab"]
    options = folder.options(["a", "b"], cache_latents=True, cache_latents_to_disk=on_disk)
    found = folder.read_with(options, vae_digest(vae))
    with counting_reads() as reads:
        encoded = encode_missing(found, vae, options)
        prints = Fingerprints(encoded)
    assert not [path for path in reads if path.endswith(".npz")]
    assert [reads[str(image)] for image in images] == [2, 2]  # its pixels, and the digest of its bytes
    again = encode_missing(folder.read_with(options, vae_digest(vae)), vae, options)
    assert Fingerprints(again) == prints
    np.testing.assert_array_equal(again[0].read_latents().latents, encoded[0].read_latents().latents)
