"""diffusers' own SDXL pipeline on our networks, and the prompt that sampling is compared with it on."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from library.samples.prompts import SamplePrompt
from library.samples.sampler import SamplingNetworks
from library.sdxl.tokenizers import PAD_G, PAD_L, save_tokenizer

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


@cache
def clip_tokenizer(pad_token_id: int) -> CLIPTokenizer:
    """transformers' tokenizer with the vocabulary that we write, padding with this token."""
    with TemporaryDirectory() as folder:
        return save_tokenizer(Path(folder), pad_token_id)


def plain_pipeline(networks: SamplingNetworks, scheduler: Any) -> StableDiffusionXLPipeline:
    """The pipeline; both prompts are its to encode."""
    made = StableDiffusionXLPipeline(
        vae=networks.vae,
        text_encoder=networks.text_encoder_l,
        text_encoder_2=networks.text_encoder_g,
        tokenizer=clip_tokenizer(PAD_L),
        tokenizer_2=clip_tokenizer(PAD_G),
        unet=networks.unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made
