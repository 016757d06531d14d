"""Draw images with a prompt for each text encoder, through diffusers' pipeline and schedulers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from library.samples.prompts import SamplePrompt
from library.samples.schedulers import make_sampling_scheduler
from library.sdxl.architecture import LATENT_SCALE
from library.sdxl.device_copies import to_device
from library.sdxl.latents import decode_latents
from library.sdxl.prediction import SDXL_PREDICTION, Prediction
from library.sdxl.text_encoding import UNWEIGHTED, TextConditioning, TextWeights, encode_captions
from library.sdxl.tokenizers import CHUNK_TOKENS, num_chunks_needed, tokenize_captions


def _already_there(*networks: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class SamplingNetworks:
    """The networks that draw an image, and what the U-Net predicts; it returns float32.

    With `zeros_l` or `zeros_g` an empty negative prompt is zero features of that encoder (for G also a zero pooled
    vector), as dropped captions are in training. The others may be elsewhere: they are called only within
    `at_hand(network, ...)`, which holds them on the U-Net's device. `kept_texts`, where the encoders are frozen, keeps
    what they have said, in host memory: a prompt is then encoded once.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder_l: nn.Module
    text_encoder_g: nn.Module
    at_hand: Callable[..., AbstractContextManager[None]] = _already_there
    zeros_l: bool = False
    zeros_g: bool = False
    prediction: Prediction = SDXL_PREDICTION
    kept_texts: dict[Any, tuple[TextConditioning, TextConditioning]] | None = None


@torch.no_grad()
def draw_latents_together(
    networks: SamplingNetworks,
    prompts: Sequence[SamplePrompt],
    *,
    sampler: str,
    width: int,
    height: int,
    seeds: Sequence[int],
    min_chunks: int = 1,
) -> torch.Tensor:
    """Return scaled latents [B, 4, h, w], in float32, of the images of B prompts, drawn in one batch.

    The same as `StableDiffusionXLPipeline(prompt=L, prompt_2=G)`, whose denoising loop runs here; only the captions are
    encoded by this module. The noise of each image comes from a CPU generator with its seed, and so does all other
    randomness: the random state of training is left alone.

    The prompts must agree in number of sampling steps, guidance scale and its rescaling. They are padded to chunks of
    75 tokens, as many as the longest needs and at least `min_chunks`.
    """
    (num_inference_steps, guidance_scale, guidance_rescale), *others = {
        (prompt.num_inference_steps, prompt.guidance_scale, prompt.guidance_rescale) for prompt in prompts
    }
    assert not others
    wanted, unwanted = _conditioning(networks, prompts, min_chunks)
    pipeline = StableDiffusionXLPipeline(
        vae=None,  # only decodes, and may be elsewhere
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=networks.unet,
        scheduler=make_sampling_scheduler(sampler, networks.prediction),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(desc=prompts[0].prompt_g[:40], leave=False, disable=None)
    return pipeline(
        prompt_embeds=wanted.hidden,
        pooled_prompt_embeds=wanted.pooled,
        negative_prompt_embeds=unwanted.hidden,
        negative_pooled_prompt_embeds=unwanted.pooled,
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images


def draw_picture(
    networks: SamplingNetworks,
    prompt: SamplePrompt,
    *,
    sampler: str,
    width: int,
    height: int,
    seed: int,
    min_chunks: int = 1,
) -> Image.Image | None:
    """Return the image of a prompt, or None if the networks return NaN or Inf."""
    latents = draw_latents_together(
        networks, [prompt], sampler=sampler, width=width, height=height, seeds=[seed], min_chunks=min_chunks
    )
    return picture_of_latents(networks, latents)


def picture_of_latents(networks: SamplingNetworks, latents: torch.Tensor) -> Image.Image | None:
    """Return the image of scaled latents [1, 4, h, w], or None if the decoder returns NaN or Inf."""
    with networks.at_hand(networks.vae):
        pixels = decode_latents(networks.vae, latents / LATENT_SCALE)[0]  # [3, H, W] in -1..1
    if not pixels.isfinite().all():
        return None
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()))


def _conditioning(
    networks: SamplingNetworks, prompts: Sequence[SamplePrompt], min_chunks: int
) -> tuple[TextConditioning, TextConditioning]:
    """Return the conditioning of prompts and negative prompts, encoded now or, by frozen encoders, before."""
    texts = tuple((each.prompt_l, each.prompt_g, each.negative_l, each.negative_g) for each in prompts)
    kept = {} if networks.kept_texts is None else networks.kept_texts
    key = min_chunks, texts
    if key not in kept:
        with networks.at_hand(networks.text_encoder_l, networks.text_encoder_g):
            encoded = _encode_prompts(networks, prompts, min_chunks)
        if networks.kept_texts is None:
            return encoded
        wanted, unwanted = (TextConditioning(*(tensor.cpu() for tensor in each)) for each in encoded)
        kept[key] = wanted, unwanted
    wanted, unwanted = (
        TextConditioning(*(to_device(tensor, networks.unet.device) for tensor in each)) for each in kept[key]
    )
    return wanted, unwanted


def _encode_prompts(
    networks: SamplingNetworks, prompts: Sequence[SamplePrompt], min_chunks: int
) -> tuple[TextConditioning, TextConditioning]:
    """Return the conditioning of prompts and negative prompts, in float32, padded to one number of chunks."""
    captions_l = [prompt.prompt_l for prompt in prompts] + [prompt.negative_l for prompt in prompts]
    captions_g = [prompt.prompt_g for prompt in prompts] + [prompt.negative_g for prompt in prompts]
    num_chunks = max(min_chunks, *(num_chunks_needed(caption) for caption in captions_l + captions_g))
    tokens = tokenize_captions(captions_l, captions_g, num_chunks).to(networks.unet.device)
    weights = _weights_of_negatives(networks, prompts, num_positions=CHUNK_TOKENS * num_chunks + 2)
    both = encode_captions(networks.text_encoder_l, networks.text_encoder_g, tokens, weights=weights)
    (hidden, unwanted_hidden), (pooled, unwanted_pooled) = (tensor.float().chunk(2) for tensor in both)
    return TextConditioning(hidden, pooled), TextConditioning(unwanted_hidden, unwanted_pooled)


def _weights_of_negatives(
    networks: SamplingNetworks, prompts: Sequence[SamplePrompt], *, num_positions: int
) -> TextWeights:
    """Return the weights of prompts and negative prompts: 0 for an empty negative prompt that is to be zeros."""
    if not (networks.zeros_l or networks.zeros_g):
        return UNWEIGHTED
    kept = [1.0] * len(prompts)
    kept_l = torch.tensor(kept + [float(not (networks.zeros_l and not each.negative_l)) for each in prompts])
    kept_g = torch.tensor(kept + [float(not (networks.zeros_g and not each.negative_g)) for each in prompts])
    device = networks.unet.device
    weights_l, weights_g = (each[:, None].expand(-1, num_positions).to(device) for each in (kept_l, kept_g))
    return TextWeights(weights_l, weights_g, kept_g.to(device))
