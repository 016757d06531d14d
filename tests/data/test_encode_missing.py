"""Encoding what has no latents before training: into memory, into files, once for each picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.config.errors import UserError
from library.data.latent_cache import cache_path, read_cache
from library.data.latent_preparation import encode_missing
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import vae_digest
from library.sdxl.sizes import Size


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return read_vae(tiny_sdxl, torch.float32)


def test_latents_in_memory_and_on_disk_are_equal_and_what_was_cached_stays(folder, vae):
    folder.add("a.png")
    folder.add("b.png", Size(60, 100))
    kept = folder.add_cache(folder.add("c.png"), vae_digest=vae_digest(vae))
    metadata = {"a": folder.entry(folder.bucket), "b": folder.entry(), "c": folder.entry(folder.bucket)}
    options = folder.options(metadata, flip_aug=False, cache_latents=True, vae_batch_size=2)
    images = folder.read_with(options, vae_digest(vae))
    before = kept.read_bytes()

    in_memory = encode_missing(images, vae, options)
    assert [path.name for path in folder.images.glob("*.npz")] == ["c.npz"]
    on_disk = encode_missing(images, vae, replace(options, cache_latents_to_disk=True))
    assert [image.key for image in in_memory] == [image.key for image in on_disk] == ["a", "b", "c"]
    assert in_memory[2] == on_disk[2] == images[2]
    assert kept.read_bytes() == before
    for memory, disk in zip(in_memory[:2], on_disk[:2], strict=True):
        assert disk.latents == cache_path(disk.source.path)
        read = read_cache(disk.latents)
        for name, value in vars(memory.latents).items():
            np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)


def test_what_was_encoded_to_disk_is_found_by_the_next_run(folder, vae, capsys):
    folder.add()
    options = folder.options({"a": folder.entry()}, flip_aug=True, cache_latents_to_disk=True)
    images = folder.read_with(options, vae_digest(vae))
    encoded = encode_missing(images, vae, options)
    (again,) = folder.read_with(options, vae_digest(vae))
    assert (again.latents, again.bucket, again.crop) == (encoded[0].latents, images[0].bucket, images[0].crop)
    assert "encoded again" not in capsys.readouterr().err


def test_a_stale_cache_is_written_over(folder, vae):
    cache = folder.add_cache(folder.add(), vae_digest="other")
    options = folder.options(["a"], cache_latents_to_disk=True)
    encode_missing(folder.read_with(options, vae_digest(vae)), vae, options)
    assert read_cache(cache).vae_digest == vae_digest(vae)


def test_two_keys_of_one_picture_both_get_its_latents(folder, vae):
    image = folder.add()
    options = folder.options(
        {"a": folder.entry(caption_l="one"), str(image): folder.entry(caption_l="two")}, cache_latents=True
    )
    first, second = encode_missing(folder.read_with(options, "vae"), vae, options)
    assert (first.captions.variants_l, second.captions.variants_l) == (("one",), ("two",))
    assert first.latents is second.latents is not None


def test_the_fingerprint_of_the_vae_can_be_that_of_its_file(folder, vae):
    folder.add()
    options = folder.options(["a"])
    (image,) = encode_missing(folder.read_with(options, "file"), vae, options, digest="file")
    assert image.latents.vae_digest == "file"


def test_a_picture_that_cannot_be_encoded_is_an_error_that_names_it(folder, vae):
    image = folder.add()
    options = folder.options(["a"], cache_latents=True)
    images = folder.read_with(options, "vae")
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a.png' cannot be used"):
        encode_missing(images, vae, options)


def test_nothing_is_done_where_all_have_latents(folder, vae, capsys):
    folder.add_cache(folder.add())
    images = folder.read(["a"])
    capsys.readouterr()
    assert encode_missing(images, vae, folder.options(["a"])) is images
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("legacy", [False, True])
def test_the_crop_is_the_same_from_the_cache_and_from_the_picture(folder, vae, legacy):
    folder.add(size=Size(101, 50))  # shrunk to 97x48: 17 columns go, 8 left and 9 right
    options = folder.options({"a": folder.entry(folder.bucket)}, legacy_crop_coords=legacy, cache_latents_to_disk=True)
    (uncached,) = folder.read_with(options, "vae")
    expected = (0, 4, 0) if legacy else (8, 0, 9)
    assert uncached.crop == expected
    encode_missing([uncached], vae, options, digest="vae")
    (cached,) = folder.read_with(options, "vae")
    assert isinstance(cached.latents, Path)
    assert cached.crop == expected
