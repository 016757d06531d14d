"""Comparison 5: for every sampler name, the latents that diffusers' pipeline draws from the same two prompts.

tests/diffusion/test_sampler.py lets the pipeline encode the prompts by itself and needs a wide tolerance for it. Here
the pipeline's `encode_prompt` encodes prompt and negative prompt at once, as we do, and none is needed. The schedulers
are those that kohya's trainers make for each name, written down here a second time.
"""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)

from library.diffusion.prompts import SAMPLERS, SamplePrompt
from library.diffusion.sampler import SamplingNetworks, draw_latents
from library.sdxl.tokenizers import PAD_G, PAD_L, save_tokenizer

SCHEDULERS: dict[str, Any] = {
    "ddim": partial(DDIMScheduler, clip_sample=False),
    "pndm": partial(PNDMScheduler, skip_prk_steps=True),
    "lms": LMSDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm_2": KDPM2DiscreteScheduler,
    "dpm_2_a": KDPM2AncestralDiscreteScheduler,
    "dpmsolver": partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpmsolver++": partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
    "dpmsingle": DPMSolverSinglestepScheduler,
    "k_lms": LMSDiscreteScheduler,
    "k_euler": EulerDiscreteScheduler,
    "k_euler_a": EulerAncestralDiscreteScheduler,
    "k_dpm_2": KDPM2DiscreteScheduler,
    "k_dpm_2_a": KDPM2AncestralDiscreteScheduler,
}
PROMPT = SamplePrompt(
    prompt_g="a cat on a sofa",
    prompt_l="photographic",
    negative_g="blurred",
    negative_l="drawing, ugly",
    guidance_scale=7.0,
    num_inference_steps=2,
)
SIZE = {"width": 64, "height": 96}
SEED = 5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # within diffusers


@pytest.fixture(scope="module")
def pipeline(tiny_networks: SamplingNetworks, tmp_path_factory) -> StableDiffusionXLPipeline:
    """diffusers' pipeline on the same networks."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = StableDiffusionXLPipeline(
        tiny_networks.vae,
        tiny_networks.text_encoder_l,
        tiny_networks.text_encoder_g,
        save_tokenizer(folder / "l", PAD_L),
        save_tokenizer(folder / "g", PAD_G),
        tiny_networks.unet,
        None,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def drawn_by_diffusers(pipeline: StableDiffusionXLPipeline, sampler: str) -> torch.Tensor:
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt=[PROMPT.prompt_l, PROMPT.negative_l],
            prompt_2=[PROMPT.prompt_g, PROMPT.negative_g],
            do_classifier_free_guidance=False,
        )
    pipeline.scheduler = SCHEDULERS[sampler](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return pipeline(
        prompt_embeds=hidden[:1],
        negative_prompt_embeds=hidden[1:],
        pooled_prompt_embeds=pooled[:1],
        negative_pooled_prompt_embeds=pooled[1:],
        **SIZE,
        num_inference_steps=PROMPT.num_inference_steps,
        guidance_scale=PROMPT.guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


def test_every_sampler_name_is_compared():
    assert set(SCHEDULERS) == set(SAMPLERS)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_are_those_that_diffusers_draws(sampler: str, pipeline, tiny_networks: SamplingNetworks):
    ours = draw_latents(tiny_networks, PROMPT, sampler=sampler, seed=SEED, **SIZE)
    expected = drawn_by_diffusers(pipeline, sampler)
    assert expected.std() > 0.1
    assert torch.equal(ours, expected)  # the ancestral ones too: one generator gives the same noise in the same order
