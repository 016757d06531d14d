"""The parts of the pretraining that can be wrong without a picture showing it."""

import random

import pytest
import torch
from diffusers import AutoencoderKL

from demo.pictures import PLACES, random_scene
from demo.pretrain_tiny_sdxl import TINY, drawn_pixels, new_model
from demo.pretrain_unet import caption_pair, soften_residuals
from demo.pretrain_vae import fold_latent_statistics, pass_colours_on, warm_cosine
from demo.shallow import silence_deep_blocks, without_deep_blocks
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.latents import decode_latents, encode_pixels
from library.sdxl.text_encoding import encode_captions
from library.sdxl.tokenizers import tokenize_captions

SCENES = [random_scene(random.Random(seed)) for seed in range(300)]


@pytest.fixture(scope="module")
def new_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(TINY.vae).eval()
    pass_colours_on(vae)
    return vae


def test_folding_gives_latents_of_deviation_one_and_changes_no_reconstruction(new_vae):
    pixels = drawn_pixels(6, seed=1)
    before = decode_latents(new_vae, encode_pixels(new_vae, pixels))
    fold_latent_statistics(new_vae, pixels)
    scaled = encode_pixels(new_vae, pixels) * LATENT_SCALE
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)  # float32, a few sums
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    after = decode_latents(new_vae, encode_pixels(new_vae, pixels))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)  # the same sums in another order


def test_colours_reach_the_latents_of_a_new_vae(new_vae):
    """A red and a blue picture of one brightness differ in the latents about as much as a dark and a bright one."""
    red, blue, dark, bright = (
        torch.tensor(colour)[None, :, None, None].expand(1, 3, 32, 32)
        for colour in ([0.5, -0.5, -0.5], [-0.5, -0.5, 0.5], [-0.4, -0.4, -0.4], [0.4, 0.4, 0.4])
    )
    tint, brightness = (
        (encode_pixels(new_vae, one) - encode_pixels(new_vae, other)).norm()
        for one, other in ((red, blue), (dark, bright))
    )
    assert tint > 0.3 * brightness


def test_silent_blocks_change_nothing_of_what_the_networks_compute():
    torch.manual_seed(0)
    model = new_model(TINY)
    soften_residuals(model)
    silence_deep_blocks(model)
    for network in (model.unet, model.text_encoder_l, model.text_encoder_g):
        network.eval()

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        tokens = tokenize_captions(["a red circle"], ["a blue star"], 1)
        text = encode_captions(model.text_encoder_l, model.text_encoder_g, tokens)
        return model.unet(
            torch.ones(1, 4, 8, 8),
            torch.tensor([500]),
            encoder_hidden_states=text.hidden,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": torch.full((1, 6), 64.0)},
        ).sample

    whole = predicted()
    num_parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    with without_deep_blocks(model):
        assert sum(parameter.numel() for parameter in model.unet.parameters()) < 0.6 * num_parameters
        torch.testing.assert_close(predicted(), whole, atol=1e-6, rtol=0)  # adding zero is exact
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == num_parameters


def test_mostly_both_encoders_get_one_caption_and_now_and_then_one_of_them_or_both_say_nothing():
    pairs = [caption_pair(scene, random.Random(number)) for number, scene in enumerate(SCENES)]
    shares = {
        "the same": sum(caption_l == caption_g != "" for caption_l, caption_g in pairs) / len(pairs),
        "nothing": sum(caption_l == caption_g == "" for caption_l, caption_g in pairs) / len(pairs),
        "only G": sum(caption_l == "" != caption_g for caption_l, caption_g in pairs) / len(pairs),
        "only L": sum(caption_g == "" != caption_l for caption_l, caption_g in pairs) / len(pairs),
    }
    # Three standard deviations of 300 draws.
    assert shares["the same"] == pytest.approx(0.6, abs=0.09)
    assert all(shares[kind] == pytest.approx(0.1, abs=0.055) for kind in ("nothing", "only G", "only L"))


def test_a_caption_says_nothing_that_the_picture_does_not_show():
    for number, scene in enumerate(SCENES):
        _, caption_g = caption_pair(scene, random.Random(number))
        where, _ = PLACES[scene.place]
        allowed = f"a {scene.magnitude} {scene.colour} {scene.shape} {where}, {scene.background} background".split()
        assert set(caption_g.replace(",", "").split()) <= {word.rstrip(",") for word in allowed}


def test_the_rate_rises_shortly_and_falls_to_zero():
    assert warm_cosine(0) < 0.05
    assert warm_cosine(0.05) == pytest.approx(1)
    assert warm_cosine(0.525) == pytest.approx(0.5)
    assert warm_cosine(1) == pytest.approx(0)
