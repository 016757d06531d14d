"""Comparison 5: for every sampler name, the latents that diffusers' pipeline draws from the same two prompts.

tests/samples/test_sampler.py lets the pipeline encode the prompts by itself and needs a wide tolerance for it. Here
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
)

from library.samples.prompts import SAMPLERS
from library.samples.sampler import SamplingNetworks, draw_latents_together
from tests.plain_pipeline import PROMPT, SEED, SIZE, plain_pipeline

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
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # within diffusers


def drawn_by_diffusers(networks: SamplingNetworks, sampler: str) -> torch.Tensor:
    pipeline = plain_pipeline(
        networks, SCHEDULERS[sampler](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt=[PROMPT.prompt_l, PROMPT.negative_l],
            prompt_2=[PROMPT.prompt_g, PROMPT.negative_g],
            do_classifier_free_guidance=False,
        )
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
def test_latents_are_those_that_diffusers_draws(sampler: str, tiny_networks: SamplingNetworks):
    ours = draw_latents_together(tiny_networks, [PROMPT], sampler=sampler, seeds=[SEED], **SIZE)
    expected = drawn_by_diffusers(tiny_networks, sampler)
    assert expected.std() > 0.1
    assert torch.equal(ours, expected)  # the ancestral ones too: one generator gives the same noise in the same order
