"""Sample pictures against diffusers' own SDXL pipeline, which encodes both prompts and denoises by itself."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.samples.prompts import SAMPLERS, SamplePrompt
from library.samples.sampler import SamplingNetworks, draw_latents_together, draw_picture
from library.samples.schedulers import make_sampling_scheduler
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.prediction import SDXL_PREDICTION
from library.sdxl.tokenizers import PAD_G, PAD_L
from tests.plain_pipeline import PROMPT, SEED, SIZE, clip_tokenizer, plain_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # within diffusers
BASIC_SAMPLERS = [name for name in SAMPLERS if not name.startswith("k_")]

# Both prompts are encoded together here, one by one in the pipeline: the last bit of a feature differs (6e-8 of it),
# which steps with guidance 7 make up to 1e-4 of the latents' deviation. Another prompt makes all of it.
TOLERANCE = 1e-3


def drawn_by_diffusers(networks: SamplingNetworks, prompt: SamplePrompt, sampler: str, **texts) -> torch.Tensor:
    texts = texts or {
        "prompt": prompt.prompt_l,
        "prompt_2": prompt.prompt_g,
        "negative_prompt": prompt.negative_l,
        "negative_prompt_2": prompt.negative_g,
    }
    return plain_pipeline(networks, make_sampling_scheduler(sampler, SDXL_PREDICTION))(
        **texts,
        **SIZE,
        num_inference_steps=prompt.num_inference_steps,
        guidance_scale=prompt.guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


def assert_same_latents(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE * expected.std().item())


def drawn(networks: SamplingNetworks, prompt: SamplePrompt, sampler: str) -> torch.Tensor:
    return draw_latents_together(networks, [prompt], sampler=sampler, seeds=[SEED], **SIZE)


# -- the same as diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", BASIC_SAMPLERS)
def test_a_picture_is_the_one_that_diffusers_draws(sampler: str, tiny_networks: SamplingNetworks):
    ours = drawn(tiny_networks, PROMPT, sampler)
    assert ours.shape == (1, 4, 12, 8)
    assert_same_latents(ours, drawn_by_diffusers(tiny_networks, PROMPT, sampler))


@pytest.mark.parametrize("prompt", [PROMPT, replace(PROMPT, negative_g="", negative_l="")])
def test_without_guidance_the_negative_prompt_plays_no_part(prompt: SamplePrompt, tiny_networks: SamplingNetworks):
    plain = replace(prompt, guidance_scale=1.0)
    expected = drawn_by_diffusers(tiny_networks, replace(PROMPT, guidance_scale=1.0), "euler")
    assert_same_latents(drawn(tiny_networks, plain, "euler"), expected)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.startswith("k_")])
def test_a_k_in_front_of_a_sampler_makes_no_difference(name: str):
    with_k, without = (
        make_sampling_scheduler(name, SDXL_PREDICTION),
        make_sampling_scheduler(name.removeprefix("k_"), SDXL_PREDICTION),
    )
    assert type(with_k) is type(without)
    assert with_k.config == without.config


@pytest.mark.parametrize("num_steps", [1, 2, 3, 30])
@pytest.mark.parametrize("sampler", BASIC_SAMPLERS)
def test_every_sampler_takes_any_number_of_steps(sampler: str, num_steps: int):
    scheduler = make_sampling_scheduler(sampler, SDXL_PREDICTION)
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        predicted = scheduler.scale_model_input(latents, timestep) * 0.1
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    assert latents.isfinite().all()


@pytest.mark.parametrize("sampler", BASIC_SAMPLERS)
def test_every_sampler_has_the_noise_levels_that_sdxl_was_trained_on(sampler: str):
    # Square roots of beta are linear from 0.00085 to 0.012; then the last of 1000 steps keeps 0.0047 of the signal.
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    found = make_sampling_scheduler(sampler, SDXL_PREDICTION).alphas_cumprod.numpy()
    np.testing.assert_allclose(found, np.cumprod(1 - betas), rtol=1e-4)  # diffusers multiplies in float32


def _embedded_by_hand(networks: SamplingNetworks, text_l: str, text_g: str, num_chunks: int) -> tuple:
    """Both texts in chunks of 75 tokens, each through its encoder on its own."""
    parts, pooled = [], None
    for text, pad, encoder in ((text_l, PAD_L, networks.text_encoder_l), (text_g, PAD_G, networks.text_encoder_g)):
        ids = clip_tokenizer(pad)(text, add_special_tokens=False).input_ids
        hidden = []
        for chunk in range(num_chunks):
            words = ids[75 * chunk : 75 * (chunk + 1)]
            padded = [49406, *words, 49407, *[pad] * (75 - len(words))]
            output = encoder(torch.tensor([padded]), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            if encoder is networks.text_encoder_g and chunk == 0:
                pooled = output.text_embeds
        inner = [each[:, 1:-1] for each in hidden]
        parts.append(torch.cat([hidden[0][:, :1], *inner, hidden[-1][:, -1:]], dim=1))
    return torch.cat(parts, dim=-1), pooled


@torch.no_grad()
def test_a_long_prompt_and_a_short_negative_are_given_the_same_number_of_chunks(tiny_networks: SamplingNetworks):
    long = replace(PROMPT, prompt_g="a cat on a sofa, " * 20, num_inference_steps=2)  # 100 tokens
    wanted, wanted_pooled = _embedded_by_hand(tiny_networks, long.prompt_l, long.prompt_g, num_chunks=2)
    unwanted, unwanted_pooled = _embedded_by_hand(tiny_networks, long.negative_l, long.negative_g, num_chunks=2)
    expected = drawn_by_diffusers(
        tiny_networks,
        long,
        "euler",
        prompt_embeds=wanted,
        pooled_prompt_embeds=wanted_pooled,
        negative_prompt_embeds=unwanted,
        negative_pooled_prompt_embeds=unwanted_pooled,
    )
    assert_same_latents(drawn(tiny_networks, long, "euler"), expected)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_its_decoded_latents(tiny_networks: SamplingNetworks):
    image = draw_picture(tiny_networks, PROMPT, sampler="euler_a", seed=SEED, **SIZE)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (64, 96))
    with torch.no_grad():
        pixels = tiny_networks.vae.decode(drawn(tiny_networks, PROMPT, "euler_a") / LATENT_SCALE).sample[0]
    expected = (pixels.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255
    # Half a step of an 8-bit channel by rounding, and a little for values at its edge.
    np.testing.assert_allclose(np.asarray(image), expected, atol=0.51)


def test_each_prompt_and_the_seed_make_a_difference(tiny_networks: SamplingNetworks):
    quick = replace(PROMPT, num_inference_steps=1)
    first = drawn(tiny_networks, quick, "euler")
    assert torch.equal(first, drawn(tiny_networks, quick, "euler"))
    for field in ("prompt_g", "prompt_l", "negative_g", "negative_l"):
        assert not torch.equal(first, drawn(tiny_networks, replace(quick, **{field: "something else"}), "euler")), field
    assert not torch.equal(
        first, draw_latents_together(tiny_networks, [quick], sampler="euler", seeds=[SEED + 1], **SIZE)
    )


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a", "ddim", "dpmsolver++"])
def test_drawing_leaves_the_random_state_alone(sampler: str, tiny_networks: SamplingNetworks):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw_picture(tiny_networks, replace(PROMPT, num_inference_steps=2), sampler=sampler, seed=SEED, **SIZE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("broken", ["unet", "vae"])
def test_networks_that_give_nan_give_no_picture(broken: str, tiny_networks: SamplingNetworks):
    network = copy.deepcopy(getattr(tiny_networks, broken))
    with torch.no_grad():
        network.state_dict()["conv_out.weight" if broken == "unet" else "decoder.conv_out.weight"].fill_(float("nan"))
    networks = replace(tiny_networks, **{broken: network})
    quick = replace(PROMPT, num_inference_steps=1)
    assert draw_picture(networks, quick, sampler="euler", seed=SEED, **SIZE) is None


def test_encoders_and_vae_are_used_only_while_they_are_at_hand(tiny_networks: SamplingNetworks):
    there: list[torch.nn.Module] = []

    @contextmanager
    def at_hand(*networks: torch.nn.Module) -> Iterator[None]:
        there.extend(module for network in networks for module in network.modules())
        yield
        there.clear()

    def require_there(network: torch.nn.Module, *_: object) -> None:
        assert network in there

    visitors = (tiny_networks.text_encoder_l, tiny_networks.text_encoder_g, tiny_networks.vae.decoder)
    hooks = [network.register_forward_pre_hook(require_there) for network in visitors]
    picture = draw_picture(replace(tiny_networks, at_hand=at_hand), PROMPT, sampler="euler", seed=SEED, **SIZE)
    for hook in hooks:
        hook.remove()
    assert picture is not None
    assert there == []
    assert picture.tobytes() == draw_picture(tiny_networks, PROMPT, sampler="euler", seed=SEED, **SIZE).tobytes()


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_frozen_encoders_encode_a_prompt_once(tiny_networks: SamplingNetworks):
    networks, calls = replace(tiny_networks, kept_texts={}), []
    hook = networks.text_encoder_g.register_forward_hook(lambda *_: calls.append("G"))
    another = replace(PROMPT, prompt_l="another")
    try:
        first, again, other = (drawn(networks, prompt, "ddim") for prompt in (PROMPT, PROMPT, another))
    finally:
        hook.remove()
    assert calls == ["G", "G"]
    assert torch.equal(first, again)
    assert torch.equal(first, drawn(tiny_networks, PROMPT, "ddim"))
    assert torch.equal(other, drawn(tiny_networks, another, "ddim"))
