"""Latents that other programs wrote, and latents that change while a run reads them."""

import zipfile

import numpy as np
import pytest

from library.config.errors import UserError
from library.data.latent_cache import read_cache
from library.sdxl.sizes import Size

# Names of the 2026 trainer


def rename(cache, image, size):
    target = image.with_name(f"{image.stem}_{size.width:04d}x{size.height:04d}_sdxl.npz")
    cache.rename(target)
    return target


@pytest.mark.parametrize("has_image", [True, False])
def test_latents_of_the_2026_trainer_are_found(folder, has_image):
    image = folder.add()
    cache = rename(folder.add_cache(image, image_digest=None, vae_digest=None, resized_size=None), image, folder.size)
    if not has_image:
        image.unlink()
    (found,) = folder.read({"a": folder.entry(folder.bucket)})
    assert (found.latents, found.bucket, found.source) == (cache, folder.bucket, None)


def test_ours_come_first_and_those_of_another_size_of_the_image_do_not_count(folder):
    image = folder.add()
    rename(folder.add_cache(image, image_digest=None), image, Size(999, 75))
    (found,) = folder.read({"a": folder.entry(folder.bucket)})
    assert found.latents is None
    cache = folder.add_cache(image)
    (found,) = folder.read({"a": folder.entry(folder.bucket)})
    assert found.latents == cache


def test_of_several_sizes_without_the_image_none_is_guessed(folder):
    image = folder.images / "a.png"
    for width in (100, 200):
        rename(folder.add_cache(image, image_digest=None), image, Size(width, 75))
    with pytest.raises(UserError, match="1 images of"):
        folder.read(["a"])


# Sizes that are no multiple of 8


def test_latents_of_a_size_in_no_whole_cells_fit(folder):
    cache = folder.add_cache(folder.add())  # for 80x48
    (found,) = folder.read({"a": folder.entry(Size(82, 49))})
    assert (found.latents, found.bucket) == (cache, Size(80, 48))


# Files that were replaced


@pytest.mark.parametrize("change", ["size", "image", "damage"])
def test_latents_that_are_replaced_while_training_are_not_trained_on(folder, change):
    image = folder.add()
    cache = folder.add_cache(image)
    (found,) = folder.read({"a": folder.entry()})
    assert found.read_latents().bucket == folder.bucket
    if change == "size":
        folder.add_cache(image, bucket=Size(64, 64))
    elif change == "image":
        folder.add_cache(image, image_digest="other")
    else:
        cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(UserError, match=r"a\.npz' (was replaced while training|is not a usable)"):
        found.read_latents()


def test_so_are_latents_of_other_programs(folder):
    facts = {"image_digest": None, "vae_digest": None, "resized_size": None}
    image = folder.add()
    folder.add_cache(image, **facts)
    (found,) = folder.read(["a"])
    other = np.ones((4, folder.bucket.height // 8, folder.bucket.width // 8), np.float32)
    folder.add_cache(image, latents=other, **facts)
    with pytest.raises(UserError, match="it holds latents of another image"):
        found.read_latents()


def test_flipped_latents_that_are_gone_are_named(folder):
    folder.add_cache(folder.add())
    (found,) = folder.read(["a"])
    with pytest.raises(UserError, match="flipped latents are gone"):
        found.read_latents().in_direction(flipped=True)


# Content that costs


def arrays(**changes):
    whole = {"latents": np.zeros((4, 6, 10)), "original_size": [100, 75], "crop_ltrb": [0, 0, 80, 48]}
    return {**whole, **changes}


@pytest.mark.parametrize("name", ["latents", "latents_flipped"])
def test_float64_that_overflows_in_the_cast_is_noticed(tmp_path, name):
    np.savez(tmp_path / "a.npz", **arrays(**{name: np.full((4, 6, 10), 1e300)}))
    with pytest.raises(UserError, match="latents hold numbers that float32 cannot"):
        read_cache(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["latents", "original_size", "image_blake2b", "alpha_mask"])
def test_a_member_that_would_unpack_to_gigabytes_is_noticed_before(tmp_path, name):
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays().items() if key != name})
    with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.npy", b"")
        file.infolist()[-1].file_size = 2**40  # what the directory says
    with pytest.raises(UserError, match=f"{name} would take 1099511627776 bytes"):
        read_cache(tmp_path / "a.npz")


def test_a_large_member_that_nobody_knows_is_named_and_not_read(folder, capsys):
    cache = folder.add_cache(folder.add())
    with zipfile.ZipFile(cache, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("huge.npy", b"")
        file.infolist()[-1].file_size = 4 * 10**9
    (found,) = folder.read(["a"])
    assert found.latents == cache
    assert f"'{cache}' holds 'huge' of 4000 MB, which is not read." in capsys.readouterr().err
