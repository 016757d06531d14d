"""Pictures to latents: what the VAE gives for them, in order, with one bad picture among good ones, and overflow."""

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.digests import file_digest
from library.config.errors import UserError
from library.data.latent_preparation import Encoding, encode_images, pixels_to_tensor
from library.images.buckets import ALPHA, BucketAssignment, BucketedImage, covering_size
from library.images.reading import load_rgb
from library.images.resizing import resize_and_crop
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.sizes import Size

BUCKET = Size(80, 48)


@pytest.fixture(scope="module")
def vae(tiny_sdxl):
    return read_vae(tiny_sdxl, torch.float32)


def picture(folder, name, size=BUCKET, bucket=BUCKET, alpha=None):
    """A picture of noise on a slope, so that no mirror image or neighbour looks like it."""
    random = np.random.default_rng(list(name.encode()))
    slope = np.linspace(0, 128, size.width)[None, :, None]
    pixels = (slope + random.integers(0, 128, (size.height, size.width, 3))).astype(np.uint8)
    image = Image.fromarray(pixels)
    if alpha is not None:
        image.putalpha(alpha)
    image.save(folder / name)
    assignment = BucketAssignment(bucket, covering_size(bucket, size), bucket.aspect - size.aspect)
    return BucketedImage(folder / name, size, assignment)


def tensor_of(picture):
    bucket, resized, _ = picture.assignment
    pixels = resize_and_crop(load_rgb(picture.path), resized, bucket)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def encoded(vae, pixels):
    return vae.encode(pixels).latent_dist.mean.numpy()


def outcomes_of(pictures, vae, **options):
    return list(encode_images(pictures, vae, Encoding(**options), vae_digest="vae"))


def test_pixels_are_scaled_to_minus_one_to_one_with_channels_first():
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    expected = torch.tensor([-1.0, 1.0, -0.6]).reshape(3, 1, 1)
    torch.testing.assert_close(pixels_to_tensor(pixels), expected)  # the default: a few float32 roundings


@pytest.mark.parametrize("size", [BUCKET, Size(201, 99), Size(60, 40)], ids=["as is", "shrunk", "enlarged"])
def test_the_cache_holds_the_latents_of_the_vae_and_what_they_were_made_from(tmp_path, vae, size):
    one = picture(tmp_path, "a.png", size)
    (outcome,) = outcomes_of([one], vae)
    cached = outcome.cached
    np.testing.assert_array_equal(cached.latents, encoded(vae, tensor_of(one))[0])
    assert (outcome.image, outcome.error, outcome.redone_in_float32) == (one, None, False)
    assert (cached.original_size, cached.bucket, cached.resized_size) == (size, BUCKET, one.assignment.resized)
    assert (cached.image_digest, cached.vae_digest) == (file_digest(one.path), "vae")
    assert (cached.latents_flipped, cached.alpha_mask) == (None, None)
    left, top, right, bottom = cached.crop_ltrb
    assert (right - left, bottom - top) == BUCKET


def test_the_true_crop_is_recorded_unless_the_legacy_one_is_asked_for(tmp_path, vae):
    one = picture(tmp_path, "a.png", Size(200, 100))  # shrunk to 96x48: 8 columns go on each side
    (true,), (legacy,) = (outcomes_of([one], vae, legacy_crop=legacy) for legacy in (False, True))
    assert (true.cached.crop_ltrb, true.cached.resized_size) == ((8, 0, 88, 48), (96, 48))
    assert (legacy.cached.crop_ltrb, legacy.cached.resized_size) == ((0, 4, 80, 44), None)
    np.testing.assert_array_equal(legacy.cached.latents, true.cached.latents)


def test_an_image_is_resized_as_it_asks_and_its_cache_says_so(tmp_path, vae):
    one = picture(tmp_path, "a.png", Size(201, 99))._replace(resize_interpolation="bicubic")
    (outcome,) = outcomes_of([one], vae)
    bucket, resized, _ = one.assignment
    pixels = resize_and_crop(load_rgb(one.path), resized, bucket, interpolation="bicubic")
    np.testing.assert_array_equal(outcome.cached.latents, encoded(vae, pixels_to_tensor(pixels)[None])[0])
    assert outcome.cached.resize_interpolation == "bicubic"
    (usual,) = outcomes_of([one._replace(resize_interpolation=None)], vae)
    assert usual.cached.resize_interpolation is None
    assert not np.array_equal(usual.cached.latents, outcome.cached.latents)


def test_the_flipped_latents_are_those_of_the_mirrored_picture(tmp_path, vae):
    one = picture(tmp_path, "a.png", Size(201, 99))
    (outcome,) = outcomes_of([one], vae, flip=True)
    np.testing.assert_array_equal(outcome.cached.latents, encoded(vae, tensor_of(one))[0])
    np.testing.assert_array_equal(outcome.cached.latents_flipped, encoded(vae, tensor_of(one).flip(-1))[0])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_every_picture_gets_its_own_latents_bucket_by_bucket_whatever_batch_and_threads(
    tmp_path, vae, batch_size, threads
):
    buckets = [BUCKET, Size(48, 80), BUCKET, Size(48, 80), BUCKET]
    pictures = [picture(tmp_path, f"{index}.png", Size(90, 90), bucket) for index, bucket in enumerate(buckets)]
    outcomes = outcomes_of(pictures, vae, batch_size=batch_size, num_threads=threads)
    assert [outcome.image for outcome in outcomes] == [pictures[index] for index in (0, 2, 4, 1, 3)]
    for outcome in outcomes:
        # Sums of another order in a larger batch: float32 rounding, 1e-7 of values about 1, over some 30 layers.
        expected = encoded(vae, tensor_of(outcome.image))[0]
        np.testing.assert_allclose(outcome.cached.latents, expected, rtol=0, atol=2e-5)


def test_the_mask_is_the_opacity_of_the_cropped_picture_and_ones_without_alpha(tmp_path, vae):
    alpha = Image.new("L", (100, 48), 51)
    alpha.paste(255, (0, 0, 50, 48))
    see_through = picture(tmp_path, "alpha.png", Size(100, 48), alpha=alpha)
    opaque = picture(tmp_path, "plain.png")
    masked = [image._replace(mask=ALPHA) for image in (see_through, opaque)]
    masks = [outcome.cached.alpha_mask for outcome in outcomes_of(masked, vae)]
    assert [(mask.shape, mask.dtype.name) for mask in masks] == [((6, 10), "float32")] * 2
    expected = np.repeat(np.float32([[1, 51 / 255]]), 5, axis=1).repeat(6, axis=0)
    np.testing.assert_allclose(masks[0], expected, rtol=1e-6)  # a mean of 64 equal numbers, each sum rounded
    np.testing.assert_array_equal(masks[1], 1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_that_cannot_be_read_do_not_stop_the_others(tmp_path, vae, batch_size):
    pictures = [picture(tmp_path, f"{index}.png") for index in range(4)]
    for index in (0, 2):
        data = pictures[index].path.read_bytes()
        pictures[index].path.write_bytes(data[: len(data) // 2])
    outcomes = {outcome.image: outcome for outcome in outcomes_of(pictures, vae, batch_size=batch_size)}
    assert [outcomes[each].cached is None for each in pictures] == [True, False, True, False]
    assert all(str(pictures[index].path) in outcomes[pictures[index]].error.problem for index in (0, 2))


def test_a_batch_of_nothing_but_broken_pictures_comes_out_with_its_errors(tmp_path, vae):
    pictures = [picture(tmp_path, f"{index}.png") for index in range(2)]
    for each in pictures:
        each.path.write_bytes(b"")
    outcomes = outcomes_of(pictures, vae, batch_size=2)
    assert ["the file is empty" in outcome.error.problem for outcome in outcomes] == [True, True]
    assert outcomes_of([], vae) == []


# Overflow


@torch.no_grad()
def vae_that_overflows_for(path, overflowing, harmless, dtype):
    """A VAE in `dtype` whose last layer exceeds the largest number of `dtype` for one picture and not for another.

    Its bias is that largest number. What it adds rounds up to infinity from half a unit in the last place on, and a
    weight is scaled such that only the first picture's largest feature gets there. float32 holds the sum.
    """
    vae = read_vae(path, torch.float32)
    features = [vae.encoder(tensor_of(each)).amax(dim=(0, 2, 3)) for each in (overflowing, harmless)]
    channel = int((features[0] - features[1].clamp(min=0)).argmax())
    higher, lower = (max(0.0, float(feature[channel])) for feature in features)
    largest = torch.finfo(dtype).max
    half_unit = largest * torch.finfo(dtype).eps / 4
    assert lower < 0.9 * higher  # else the rounding of `dtype` itself would decide
    vae.quant_conv.weight[0] = 0
    vae.quant_conv.weight[0, channel] = half_unit / ((higher + lower) / 2)
    vae.quant_conv.bias[0] = largest
    return vae.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_overflows_is_redone_in_float32_and_said_so_and_the_vae_stays_as_it_was(
    tmp_path, tiny_sdxl, dtype, batch_size
):
    pictures = [picture(tmp_path, "a.png"), picture(tmp_path, "b.png")]
    vae = vae_that_overflows_for(tiny_sdxl, *pictures, dtype)
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    with torch.no_grad():
        as_held = [vae.encode(tensor_of(each).to(dtype)).latent_dist.mean for each in pictures]
    assert [bool(latents.isfinite().all()) for latents in as_held] == [False, True]

    outcomes = outcomes_of(pictures, vae, batch_size=batch_size)
    assert [outcome.redone_in_float32 for outcome in outcomes] == [True, False]
    assert vae.dtype == dtype
    assert all(torch.equal(weight, weights[name]) for name, weight in vae.state_dict().items())
    expected = encoded(vae.to(torch.float32), tensor_of(pictures[0]))[0]
    np.testing.assert_array_equal(outcomes[0].cached.latents, expected)
    assert np.isfinite(outcomes[1].cached.latents).all()


def test_an_overflow_of_the_mirrored_picture_alone_is_redone_too(tmp_path, tiny_sdxl):
    plain = picture(tmp_path, "a.png")
    mirrored = picture(tmp_path, "mirrored.png")
    Image.open(plain.path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored.path)
    vae = vae_that_overflows_for(tiny_sdxl, mirrored, plain, torch.float16)
    (outcome,) = outcomes_of([plain], vae, flip=True)
    assert outcome.redone_in_float32
    assert np.isfinite(outcome.cached.latents_flipped).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_in_float32_either_is_an_error_that_names_the_picture(tmp_path, tiny_sdxl, dtype):
    vae = read_vae(tiny_sdxl, dtype)
    vae.quant_conv.bias.data[0] = torch.nan
    pictures = [picture(tmp_path, "a.png"), picture(tmp_path, "b.png")]
    for outcome in outcomes_of(pictures, vae, batch_size=2):
        assert outcome.cached is None
        assert isinstance(outcome.error, UserError)
        assert outcome.error.problem == f"'{outcome.image.path}': the VAE's output is NaN or Inf, in float32 too."


def test_no_memory_for_a_picture_is_an_error_that_says_its_size_and_what_helps(tmp_path, tiny_sdxl, monkeypatch):
    vae = read_vae(tiny_sdxl, torch.float32)

    def in_little_memory(sample):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(vae.encoder, "forward", in_little_memory)
    with pytest.raises(UserError, match=r"encoding an image of 80x48 \(CUDA out of memory\)\..*--mixed_precision=bf16"):
        outcomes_of([picture(tmp_path, "a.png")], vae)
