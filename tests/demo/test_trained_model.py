"""The tiny SDXL of the repository draws what its prompt says, whichever way it is loaded."""

from itertools import pairwise

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from demo.classifier import read_pictures
from demo.figures import draw_all
from demo.pretrain_tiny_sdxl import TINY, main
from library.diffusion.prompts import SamplePrompt
from library.sdxl.architecture import ARCHITECTURE_KEY, Architecture, empty_model
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, tensors_to_write
from library.sdxl.diffusers_folder import write_diffusers_folder

SHOWN = [("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "star")]
STEPS, GUIDANCE = 12, 4.0


def test_the_file_has_the_tensors_of_sdxls_layout_and_is_small(trained_sdxl):
    assert trained_sdxl.stat().st_size <= 15e6
    wanted = {tensor.name: list(tensor.shape) for tensor in tensors_to_write(empty_model(TINY), None)}
    with safe_open(trained_sdxl, "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == wanted  # noqa: SIM118
        assert Architecture.from_json(file.metadata()[ARCHITECTURE_KEY]) == TINY


@pytest.fixture(scope="module")
def drawn(trained_networks):
    """A picture for each of `SHOWN`, asked for in both encoders."""
    return draw_all(trained_networks, [prompt_for(*each) for each in SHOWN], seeds=range(len(SHOWN)))


def prompt_for(colour, shape):
    caption = f"a {colour} {shape}"
    return SamplePrompt(caption, caption, guidance_scale=GUIDANCE, num_inference_steps=STEPS)


def test_a_red_circle_is_a_red_circle_and_so_are_other_colours_and_shapes(drawn, classifier):
    read = [(reading.colour, reading.shape) for reading in read_pictures(classifier, drawn)]
    assert read == SHOWN


def test_the_pictures_are_plain_since_no_caption_has_named_a_style_yet(drawn, classifier):
    assert {reading.style for reading in read_pictures(classifier, drawn)} == {"plain"}


def test_diffusers_draws_a_red_circle_after_the_model_was_saved_as_a_folder(trained_sdxl, classifier, tmp_path):
    write_diffusers_folder(tmp_path / "model", read_single_file(trained_sdxl, ModelDtypes()), torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline(
        "a red circle",
        width=96,
        height=96,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images
    [reading] = read_pictures(classifier, [picture])
    assert (reading.colour, reading.shape) == ("red", "circle")


def test_one_step_of_pretraining_writes_a_whole_model_with_the_vae_that_is_given(trained_sdxl, tmp_path):
    path = tmp_path / "tiny.safetensors"
    assert main([str(path), f"--vae={trained_sdxl}", "--unet_steps=1", "--num_drawings=60"]) == 0
    given, written = (read_single_file(file, ModelDtypes()) for file in (trained_sdxl, path))
    assert all(torch.equal(a, b) for a, b in zip(given.vae.parameters(), written.vae.parameters(), strict=True))


def test_captions_reach_the_picture_through_each_encoder(trained_networks, classifier):
    """With the other encoder's prompt empty. Colours only: of one encoder alone the model knows less than of both."""
    colours = [colour for colour, _ in SHOWN]
    prompts = [
        SamplePrompt(
            prompt_g=f"a {colour} circle" if asks_g else "",
            prompt_l="" if asks_g else f"a {colour} circle",
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
        )
        for asks_g in (False, True)
        for colour in colours
    ]
    read = [reading.colour for reading in read_pictures(classifier, draw_all(trained_networks, prompts, range(8)))]
    assert read == colours * 2
    assert all(one != other for one, other in pairwise(colours))
