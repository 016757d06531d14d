"""Masks: the values of the reference, the part of the mask that belongs to the part of the image, and bad masks."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.errors import UserError
from library.config.options import problems_of
from library.data.latent_cache import CachedLatents, cache_path, read_cache, write_cache
from library.data.latent_preparation import encode_missing
from library.data.training_set_options import TrainingSetOptions
from library.diffusion.objective import per_sample_loss
from library.images.augmentation import Augmentation
from library.images.buckets import ALPHA, BucketAssignment, BucketedImage
from library.images.crops import Crop
from library.images.masks import area_mean, load_masked
from library.images.resizing import resize_and_crop
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.sizes import Size
from tests.training_images import captioned, image_of, micro_batch, subset_of

CASES = json.loads((Path(__file__).parents[1] / "golden" / "masked_loss.json").read_text(encoding="utf-8"))["cases"]
SIZE, RESIZED, BUCKET = Size(203, 100), Size(97, 48), Size(80, 48)
LEFT, RIGHT = 8, 9  # columns of the resized image that the crop takes away


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_masked_loss_is_that_of_the_reference(case):
    losses = torch.tensor(case["loss"])
    conditioning = case.get("conditioning")  # the first channel counts, and it goes before the alpha channel
    values = case.get("alpha") if conditioning is None else [channels[0] for channels in conditioning]
    mask = area_mean(torch.tensor(values, dtype=torch.float32)[:, None] / 255, *losses.shape[-2:])
    masked = per_sample_loss(losses, torch.zeros_like(losses), mask, pixel_loss=lambda errors, timesteps: errors)
    torch.testing.assert_close(masked, torch.tensor(case["per_sample"]))
    torch.testing.assert_close(losses * mask, torch.tensor(case["result"]))


# -- an image and its mask --------------------------------------------------------------------------------------------


def save_image(folder, name="a.png", alpha=None):
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (SIZE.height, SIZE.width, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    if alpha is not None:
        image.putalpha(alpha)
    folder.mkdir(exist_ok=True)
    image.save(folder / name)
    return folder / name


def save_mask(folder, name="a.png", size=SIZE, left=0, right=128):
    """A mask that is white from column `left` to `right`."""
    mask = Image.new("L", size)
    mask.paste(255, (left, 0, right, size[1]))
    folder.mkdir(exist_ok=True)
    mask.save(folder / name)
    return folder / name


def bucketed(path, mask=None):
    return BucketedImage(path, SIZE, BucketAssignment(BUCKET, RESIZED, 0.0), mask=mask)


def cells_of(mask, left=LEFT):
    """The mean of each latent cell, of the part of the mask that is cut like the image."""
    part = resize_and_crop(mask, RESIZED, BUCKET, corner=(left, 0)).astype(np.float64) / 255
    return part.reshape(6, 8, 10, 8).mean(axis=(1, 3))


def test_a_mask_is_cut_as_its_image_wherever_that_is_cut(tmp_path):
    mask = save_mask(tmp_path / "masks", left=40, right=128)
    source = bucketed(save_image(tmp_path), mask)
    for corner in (None, (0, 0), (17, 0)):
        pixels, cells = load_masked(source, RESIZED, corner)
        assert (pixels.shape, cells.shape, cells.dtype) == ((48, 80, 3), (6, 10), np.float32)
        expected = cells_of(Image.open(mask), LEFT if corner is None else corner[0])
        np.testing.assert_allclose(cells, expected, atol=1e-6)
    assert load_masked(bucketed(source.path), RESIZED).mask is None


def test_the_first_channel_of_a_mask_counts_and_what_is_transparent_is_black(tmp_path):
    drawn = Image.new("RGB", SIZE, (255, 0, 0))
    drawn.paste((0, 255, 255), (100, 0, 203, 100))
    drawn.save(tmp_path / "red.png")
    clear = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 100, 100))
    clear.save(tmp_path / "clear.png")
    path = save_image(tmp_path)
    red, transparent = (
        load_masked(bucketed(path, tmp_path / f"{name}.png"), RESIZED).mask for name in ("red", "clear")
    )
    np.testing.assert_array_equal(red, transparent)
    assert (red[0, 0], red[0, -1]) == (1, 0)


def test_an_image_without_an_alpha_channel_is_opaque(tmp_path):
    alpha = Image.new("L", SIZE, 51)
    see_through, opaque = save_image(tmp_path, "a.png", alpha), save_image(tmp_path, "b.png")
    masks = [load_masked(bucketed(path, ALPHA), RESIZED).mask for path in (see_through, opaque)]
    for mask, value in zip(masks, (0.2, 1.0), strict=True):
        np.testing.assert_allclose(mask, value, atol=1e-6)


def training_images(tmp_path, vae, subset):
    """The same image, encoded in the step and cached, with a mask; and another one without."""
    path, mask = save_image(tmp_path), save_mask(tmp_path / "masks")
    crop = Crop(LEFT, 0, RIGHT)
    in_step = image_of("a", "l", "g", SIZE, BUCKET, crop, source=bucketed(path, mask), subset=subset, mask=mask)
    options = TrainingSetOptions(cache_latents=True)
    [cached] = encode_missing([in_step], vae, options, digest="vae")
    plain = image_of("b", "l", "g", SIZE, BUCKET, crop, source=bucketed(path), subset=subset)
    return in_step, cached, plain


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return read_vae(tiny_sdxl, torch.float32)


def test_a_batch_has_the_masks_of_its_images_flipped_as_they_are(tmp_path, vae):
    in_step, cached, plain = training_images(tmp_path, vae, subset_of(augmentation=Augmentation(flip_aug=True)))
    flips = (False, True)
    from_pixels = captioned([in_step])[micro_batch((0, 0), flips)].masks
    from_cache = captioned([cached])[micro_batch((0, 0), flips)].masks
    assert from_pixels.shape == (2, 1, 6, 10)
    assert torch.equal(from_pixels, from_cache)
    assert torch.equal(from_pixels[1], from_pixels[0].flip(-1))
    assert not torch.equal(from_pixels[1], from_pixels[0])
    mixed = captioned([in_step, plain])[micro_batch((0, 1))]
    assert torch.equal(mixed.masks[0], from_pixels[0])
    assert torch.equal(mixed.masks[1], torch.ones(1, 6, 10))
    assert captioned([plain])[micro_batch((0,))].masks is None


def test_a_mask_moves_with_a_random_crop(tmp_path):
    augmentation = Augmentation(random_crop=True)
    mask = save_mask(tmp_path / "masks", left=60, right=140)
    image = image_of(
        "a",
        *("l", "g"),
        SIZE,
        BUCKET,
        Crop(LEFT, 0, RIGHT),
        source=bucketed(save_image(tmp_path), mask),
        subset=subset_of(augmentation=augmentation),
        mask=mask,
    )
    batch = captioned([image])[micro_batch((0, 0, 0), occurrences=(0, 1, 2))]
    lefts = [int(left) for _, left in batch.crop_top_lefts.tolist()]
    assert len(set(lefts)) > 1
    for left, cells in zip(lefts, batch.masks, strict=True):
        np.testing.assert_allclose(cells[0], cells_of(Image.open(mask), left), atol=1e-6)


def test_on_disk_two_subsets_share_a_file_which_has_the_mask(tmp_path, vae, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the metadata beside which the index is written
    in_step, _, plain = training_images(tmp_path, vae, subset_of())
    options = TrainingSetOptions(cache_latents_to_disk=True)
    images = encode_missing([plain, in_step], vae, options, digest="vae")
    assert images[0].latents == images[1].latents
    assert read_cache(images[0].latents).alpha_mask is not None
    batch = captioned(images)[micro_batch((0, 1))]
    assert batch.masks[0].min() == 1
    assert batch.masks[1].min() == 0
    other = replace(plain, source=bucketed(plain.source.path, ALPHA), mask=ALPHA)
    with pytest.raises(UserError, match=r"has two masks, .*, and one file for its latents"):
        encode_missing([other, in_step], vae, options, digest="vae")


def test_another_mask_is_another_image_to_a_resumed_run(tmp_path, vae):
    in_step, cached, plain = training_images(tmp_path, vae, subset_of())
    before = in_step.fingerprint(), cached.fingerprint()
    unmasked = plain.fingerprint(), replace(in_step, mask=None).fingerprint()
    assert unmasked[0] == unmasked[1] != before[0]
    save_mask(tmp_path / "masks", right=60)
    [again] = encode_missing([in_step], vae, TrainingSetOptions(cache_latents=True), digest="vae")
    assert in_step.fingerprint() != before[0]
    assert again.fingerprint() != before[1]


def test_a_file_that_lost_its_mask_while_training_is_named(tmp_path, vae):
    in_step, cached, _ = training_images(tmp_path, vae, subset_of())
    path = cache_path(in_step.source.path)
    write_cache(path, replace(cached.latents, alpha_mask=None, mask_digest=None))
    with pytest.raises(UserError, match="was replaced while training: it holds no mask"):
        captioned([replace(cached, latents=path)])[micro_batch((0,))]


# -- which mask belongs to which image --------------------------------------------------------------------------------


def masked(folder, metadata, **flags):
    """The training set with masks in the folder `masks`."""
    masks = folder.path / "masks"
    masks.mkdir(exist_ok=True)
    return folder.read(metadata, masked_loss=True, conditioning_data_dir=masks, **flags)


def test_a_mask_lies_at_the_place_of_its_image_or_has_its_name(folder, caplog):
    caplog.set_level(logging.INFO)
    for name in ("a/x.png", "b/x.jpg", "y.png"):
        folder.add(name)
        (folder.path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
    for name in ("a/x.png", "b/x.png", "a/y.webp", "a/unused.png"):
        save_mask(folder.path / "masks" / Path(name).parent, Path(name).name, folder.size)
    images = masked(folder, ["a/x.png", "b/x.jpg", "y"])
    assert [image.mask.relative_to(folder.path / "masks").as_posix() for image in images] == [
        *("a/x.png", "b/x.png", "a/y.webp")
    ]
    assert "1 masks of '" in caplog.text and "belong to no image: 'unused.png'" in caplog.text
    assert "masks: 3 from files, of 3 images; the others are trained whole" in caplog.text


def test_images_without_a_mask_are_named_and_counted_unless_they_are_regularization_images(folder):
    for name in "abc":
        folder.add(f"{name}.png")
    entries = {name: folder.entry() | {"is_reg": name == "c"} for name in "abc"}
    with pytest.raises(UserError, match=r"2 images of '.*' have no mask in '.*masks': a, b"):
        masked(folder, entries)
    for name in "ab":
        save_mask(folder.path / "masks", f"{name}.png", folder.size)
    assert [image.mask is None for image in masked(folder, entries)] == [False, False, True]


def test_what_has_no_file_has_its_alpha_channel_where_both_are_asked_for(folder, caplog):
    caplog.set_level(logging.INFO)
    for name in "abc":
        folder.add(f"{name}.png")
    half = Image.new("L", folder.size, 128)
    image = Image.open(folder.images / "b.png")
    image.putalpha(half)
    image.save(folder.images / "b.png")
    save_mask(folder.path / "masks", "a.png", folder.size)
    images = masked(folder, "abc", alpha_mask=True)
    assert [image.mask if image.mask == ALPHA else image.mask.name for image in images] == ["a.png", ALPHA, ALPHA]
    assert "masks: 1 from files and 1 from alpha channels, of 3 images" in caplog.text


def test_a_name_that_stands_for_two_masks_is_refused(folder):
    folder.add("a.png")
    for place in ("x", "y"):
        (folder.path / "masks").mkdir(exist_ok=True)
        save_mask(folder.path / "masks" / place, "a.png", folder.size)
    with pytest.raises(UserError, match=r"the mask of '.*a.png' could be '.*x.a.png' or '.*y.a.png'"):
        masked(folder, "a")


def test_masks_of_another_size_black_ones_and_damaged_ones_are_named_at_once(folder):
    masks = folder.path / "masks"
    for name in "abcde":
        folder.add(f"{name}.png")
        save_mask(masks, f"{name}.png", folder.size)
    save_mask(masks, "a.png", Size(60, 100))
    save_mask(masks, "b.png", folder.size, right=0)
    save_mask(masks, "c.png", folder.size, right=2)  # the crop takes these columns away
    (masks / "d.png").write_bytes(b"no image")
    with pytest.raises(UserError) as raised:
        masked(folder, {name: folder.entry(resolution=(48, 48)) for name in "abcde"})
    text = str(raised.value)
    assert text.startswith("4 images cannot be used: ")
    for part in (
        *("the mask is 60x100, its image 100x60", "b.png' is black wherever it would be trained"),
        *("c.png' is black wherever it would be trained", "d.png' cannot be used: it is not an image"),
    ):
        assert part in text


def test_alpha_channels_that_do_not_exist_or_leave_nothing_are_refused(folder):
    path = folder.add("a.png")
    with pytest.raises(UserError, match="--alpha_mask: none of 1 images has an alpha channel"):
        folder.read("a", alpha_mask=True)
    image = Image.open(path)
    image.putalpha(0)
    image.save(path)
    with pytest.raises(UserError, match=r"a.png' cannot be used: it is transparent wherever it would be trained"):
        folder.read("a", alpha_mask=True)


# -- masks and caches -------------------------------------------------------------------------------------------------

CELLS = np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)


def test_a_cache_without_a_mask_is_named_and_its_image_encoded_again(folder, caplog):
    folder.add_cache(folder.add("a.png"))
    save_mask(folder.path / "masks", "a.png", folder.size)
    [image] = masked(folder, "a")
    assert image.latents is None
    assert image.source.mask == image.mask
    assert "does not fit: it lacks the mask (--conditioning_data_dir). It is encoded again." in caplog.text


def test_a_cache_without_a_mask_whose_image_is_gone_is_an_error(folder):
    path = folder.add("a.png")
    folder.add_cache(path)
    path.unlink()
    save_mask(folder.path / "masks", "a.png", folder.size)
    with pytest.raises(UserError, match=r"latents of 1 images lack masks, and the images are gone: a\. Run"):
        masked(folder, "a")


def test_a_cached_mask_is_used_without_the_image_and_refused_if_black(folder):
    path = folder.add("a.png")
    folder.add_cache(path, alpha_mask=CELLS)
    path.unlink()
    [image] = folder.read("a", alpha_mask=True)
    np.testing.assert_array_equal(image.read_latents().alpha_mask, CELLS)
    folder.add_cache(path, alpha_mask=0 * CELLS)
    with pytest.raises(UserError, match="it is transparent wherever it would be trained"):
        folder.read("a", alpha_mask=True)


def test_a_mask_in_pixels_is_read_as_that_of_the_latents(tmp_path):
    in_pixels = np.random.default_rng(1).random((48, 80)).astype(np.float32)
    cached = CachedLatents(np.zeros((4, 6, 10), np.float32), SIZE, (0, 0, 80, 48), alpha_mask=in_pixels)
    write_cache(tmp_path / "a.npz", cached)
    expected = in_pixels.reshape(6, 8, 10, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(read_cache(tmp_path / "a.npz").alpha_mask, expected, rtol=1e-6)


@pytest.mark.parametrize("mask", [CELLS[:5], CELLS * 1.01, CELLS - 0.01, CELLS * np.nan, CELLS.astype(int)])
def test_a_cached_mask_that_is_none_is_named(tmp_path, mask):
    np.savez(
        tmp_path / "a.npz",
        latents=np.zeros((4, 6, 10), np.float32),
        original_size=SIZE,
        crop_ltrb=[0, 0, 80, 48],
        alpha_mask=mask,
    )
    with pytest.raises(UserError, match=r"is not a usable latent cache .alpha_mask"):
        read_cache(tmp_path / "a.npz")


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"masked_loss": True}, "--masked_loss has no masks"),
        ({"conditioning_data_dir": Path()}, "--conditioning_data_dir has no effect without --masked_loss"),
        ({"masked_loss": True, "conditioning_data_dir": Path("none")}, "there is no folder 'none'"),
    ],
)
def test_flags_without_masks_are_refused(folder, flags, problem):
    assert [each for each in problems_of(folder.options("a", **flags)) if problem in each]
