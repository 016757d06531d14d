"""Pixels to latents and back: against diffusers, through a real overflow, and a fingerprint of the VAE."""

import copy

import pytest
import torch

from library.sdxl import latents
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import TILE, decode_latents, encode_pixels, encode_pixels_finite, vae_digest

OVERFLOWING = 3e4
"""What the first convolution is multiplied by: its weights still fit float16, its sums over a bright picture do not."""


@pytest.fixture(scope="module")
def float16_vae(sdxl_model):
    """A VAE of the test's own."""
    return copy.deepcopy(sdxl_model.vae)


@pytest.fixture(scope="module")
def vae(float16_vae):
    return copy.deepcopy(float16_vae).float()


@pytest.fixture(scope="module")
def pixels():
    """Three pictures [3, 3, 64, 96] in -1..1: noise, black in the middle of the range, noise."""
    pixels = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[1] = 0
    return pixels


@pytest.fixture(scope="module")
def overflowing_vae(float16_vae):
    """A float16 VAE in which bright pixels exceed 65504 but grey ones do not."""
    vae = copy.deepcopy(float16_vae)
    vae.encoder.conv_in.weight.data *= OVERFLOWING / vae.encoder.conv_in.weight.abs().max()
    assert vae.encoder.conv_in.weight.isfinite().all()
    return vae


def weights(vae):
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in vae.state_dict().items()}


def same_weights(vae, before):
    after = weights(vae)
    return all(after[name][0] == dtype and torch.equal(after[name][1], old) for name, (dtype, old) in before.items())


def test_latents_are_the_mode_of_diffusers_posterior_unscaled(vae, pixels):
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode()
    found = encode_pixels(vae, pixels)
    assert found.shape == (3, 4, 8, 12)
    assert torch.equal(found, expected)


def test_decoding_gives_the_pixels_that_diffusers_decodes(vae, pixels):
    encoded = encode_pixels(vae, pixels)
    decoded = decode_latents(vae, encoded)
    with torch.no_grad():
        assert torch.equal(decoded, vae.decode(encoded).sample)
    assert decoded.shape == pixels.shape
    assert not decoded.requires_grad


def passes_of(module, compute) -> int:
    """How often `compute()` runs the module."""
    passes = []
    hook = module.register_forward_hook(lambda *_: passes.append(1))
    try:
        compute()
    finally:
        hook.remove()
    return len(passes)


@pytest.mark.parametrize(("spare", "num_decoded", "num_encoded"), [(-1, 2, 3), (0, 1, 1)])
def test_what_would_not_fit_a_gpu_is_divided_before_it_is_tried(vae, monkeypatch, spare, num_decoded, num_encoded):
    width = vae.config.block_out_channels[0] / 128
    cells = torch.zeros(1, 4, TILE // 2, TILE + TILE // 2)  # two tiles, as diffusers lets them overlap
    peak = int(768 * width * 4 * cells[0, 0].numel() * 64)  # numbers a pixel, bytes
    monkeypatch.setattr(latents, "free_bytes", lambda device: peak + spare)
    assert passes_of(vae.decoder, lambda: decode_latents(vae, cells)) == num_decoded
    pictures = torch.zeros(3, 3, 64, 64)
    peak = int(640 * width * 4 * 3 * 64 * 64)
    monkeypatch.setattr(latents, "free_bytes", lambda device: peak + spare)
    own = copy.deepcopy(vae)
    assert passes_of(own.encoder, lambda: encode_pixels(own, pictures)) == num_encoded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_float32_whatever_the_vae_is_held_in(vae, pixels, dtype):
    narrow = copy.deepcopy(vae).to(dtype)
    found = encode_pixels(narrow, pixels)
    assert found.dtype == decode_latents(narrow, found).dtype == torch.float32
    expected = encode_pixels(vae, pixels)
    # Each of some 30 layers rounds to 8 (bfloat16) or 11 (float16) bits.
    assert (found - expected).norm() / expected.norm() < (0.1 if dtype == torch.bfloat16 else 0.01)


def test_only_the_samples_that_overflow_are_encoded_again_in_float32(overflowing_vae, pixels):
    first = encode_pixels(overflowing_vae, pixels)
    assert [bool(sample.isfinite().all()) for sample in first] == [False, True, False]

    encoded = encode_pixels_finite(overflowing_vae, pixels)
    assert (encoded.redone, encoded.failed) == ([0, 2], [])
    assert torch.equal(encoded.latents[1], first[1])
    in_float32 = encode_pixels(copy.deepcopy(overflowing_vae).float(), pixels[[0, 2]])
    assert in_float32.isfinite().all()
    assert torch.equal(encoded.latents[[0, 2]], in_float32)


def test_redoing_leaves_the_vae_as_it_was(overflowing_vae, pixels):
    before = weights(overflowing_vae)
    assert encode_pixels_finite(overflowing_vae, pixels).redone
    assert overflowing_vae.dtype == torch.float16
    assert same_weights(overflowing_vae, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sample_that_fails_in_float32_too_is_named(vae, pixels, dtype):
    held = copy.deepcopy(vae).to(dtype)
    broken = pixels.clone()
    broken[2, 0, 5, 5] = torch.nan
    encoded = encode_pixels_finite(held, broken)
    assert encoded.failed == [2]
    assert encoded.redone == ([] if dtype == torch.float32 else [2])
    assert torch.equal(encoded.latents[:2], encode_pixels(held, broken)[:2])
    assert held.dtype == dtype


def test_samples_that_are_all_finite_are_encoded_once(vae, pixels):
    encoded = encode_pixels_finite(vae, pixels)
    assert (encoded.redone, encoded.failed) == ([], [])
    assert torch.equal(encoded.latents, encode_pixels(vae, pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_vae_has_one_digest_in_whichever_precision_its_file_is_read(sdxl_file, float16_vae, dtype):
    assert vae_digest(read_vae(sdxl_file, dtype)) == vae_digest(float16_vae)


@pytest.mark.parametrize("name", ["decoder.conv_out.bias", "encoder.conv_in.weight"])
def test_one_changed_weight_gives_another_digest(float16_vae, name):
    changed = copy.deepcopy(float16_vae)
    changed.state_dict()[name].view(-1)[0] += 0.25
    assert vae_digest(changed) != vae_digest(float16_vae)


# -- too little memory ------------------------------------------------------------------------------------------------


def test_a_picture_too_large_for_the_memory_is_decoded_in_tiles_and_that_is_said(vae, monkeypatch, capsys):
    """Memory that ends at 64 x 64 latent cells."""
    latents = torch.randn(1, 4, 64, 80, generator=torch.Generator().manual_seed(0))
    whole = decode_latents(vae, latents)
    decode = vae.decoder.forward
    seen = []

    def in_little_memory(sample, *others):
        seen.append(tuple(sample.shape[-2:]))
        if sample.shape[-2] * sample.shape[-1] > 64 * 64:
            raise torch.OutOfMemoryError("no memory")
        return decode(sample, *others)

    monkeypatch.setattr(vae.decoder, "forward", in_little_memory)
    tiled = decode_latents(vae, latents)
    assert seen[0] == (64, 80)
    assert set(seen[1:]) <= {(64, 64), (64, 32), (16, 64), (16, 32)}
    assert "decoded in tiles" in capsys.readouterr().err
    # Normalisation is over a tile instead of the picture: of noise, means that hardly differ.
    assert tiled.shape == whole.shape
    assert (tiled - whole).norm() < 0.1 * whole.norm()
    assert not vae.use_tiling


def test_a_batch_too_large_for_the_memory_is_encoded_one_by_one_from_then_on(vae, monkeypatch, capsys):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = torch.cat([encode_pixels(vae, one[None]) for one in pixels])
    encode = vae.encoder.forward
    seen = []

    def in_little_memory(sample):
        seen.append(len(sample))
        if len(sample) > 1:
            raise torch.OutOfMemoryError("no memory")
        return encode(sample)

    monkeypatch.setattr(vae.encoder, "forward", in_little_memory)
    assert torch.equal(encode_pixels(vae, pixels), expected)
    assert torch.equal(encode_pixels(vae, pixels), expected)
    assert seen == [3, 1, 1, 1, 1, 1, 1]
    assert capsys.readouterr().err.count("one by one") == 1
    vae.disable_slicing()


def test_a_single_picture_too_large_for_the_memory_is_an_error(vae, monkeypatch):
    def no_memory(sample):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(vae.encoder, "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        encode_pixels(vae, torch.zeros(1, 3, 32, 32))
