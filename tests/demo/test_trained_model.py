"""The tiny SDXL of the repository draws what its prompt says, whichever way it is loaded."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from demo.classifier import read_images
from demo.figures import draw_all
from demo.pretrain_tiny_sdxl import TINY, main
from library.samples.prompts import SamplePrompt
from library.sdxl.architecture import ARCHITECTURE_KEY, Architecture, empty_model
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, tensors_to_write
from library.sdxl.diffusers_folder import write_diffusers_folder

SHOWN = [
    ("circle", "red", "white"),
    ("square", "blue", "black"),
    ("triangle", "green", "grey"),
    ("star", "yellow", "black"),
]
"""Shapes, colours and backgrounds: what the model does reliably. Places are half learnt (demo/README.md)."""
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
    captions = [caption_of(*each) for each in SHOWN]
    return draw_all(trained_networks, [prompt_for(caption, caption) for caption in captions], seeds=range(len(SHOWN)))


def caption_of(shape, colour, background):
    return f"a large {colour} {shape} in the middle, {background} background"


def prompt_for(prompt_l, prompt_g):
    return SamplePrompt(prompt_g, prompt_l, guidance_scale=GUIDANCE, num_inference_steps=STEPS)


def test_shape_colour_and_background_are_those_of_the_prompt(drawn, classifier):
    readings = read_images(classifier, drawn)
    assert [(reading.shape, reading.colour, reading.background) for reading in readings] == SHOWN


def test_the_pictures_are_plain_since_no_caption_has_named_a_style_yet(drawn, classifier):
    assert {reading.style for reading in read_images(classifier, drawn)} == {"plain"}


def test_diffusers_draws_a_circle_after_the_model_was_saved_as_a_folder(trained_sdxl, classifier, tmp_path):
    write_diffusers_folder(tmp_path / "model", read_single_file(trained_sdxl, ModelDtypes()), torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline(
        caption_of("circle", "red", "black"),
        width=96,
        height=96,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images
    [reading] = read_images(classifier, [picture])
    assert (reading.shape, reading.colour, reading.background) == ("circle", "red", "black")


@pytest.mark.slow  # half a minute
@pytest.mark.trains
def test_one_step_of_pretraining_writes_a_whole_model_with_the_vae_that_is_given(trained_sdxl, tmp_path):
    path = tmp_path / "tiny.safetensors"
    assert main([str(path), f"--vae={trained_sdxl}", "--unet_steps=1", "--num_drawings=60"]) == 0
    given, written = (read_single_file(file, ModelDtypes()) for file in (trained_sdxl, path))
    assert all(torch.equal(a, b) for a, b in zip(given.vae.parameters(), written.vae.parameters(), strict=True))


def test_each_encoder_alone_says_which_shape_is_drawn(trained_networks, classifier):
    captions = [caption_of(*each) for each in SHOWN]
    prompts = [prompt_for(caption, "") for caption in captions] + [prompt_for("", caption) for caption in captions]
    readings = read_images(classifier, draw_all(trained_networks, prompts, seeds=range(len(prompts))))
    assert [reading.shape for reading in readings] == [shape for shape, _, _ in SHOWN] * 2
