"""Measure how well a model follows the two prompts: it draws images, and the classifier reads them.

python demo/figures.py "my set/output/finetuned_model.safetensors"             separate prompts for L and G
python demo/figures.py "my set/output/finetuned_model.safetensors" --joint     one prompt for both encoders
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch
from PIL import Image

from demo.classifier import QUESTIONS, Reading, load_classifier, read_images, reading_of
from demo.pictures import HELD_OUT, MAGNITUDES, SIZES, STYLES, Scene, random_scene
from library.config.atomic_files import write_text
from library.config.errors import exits_on_user_error
from library.samples.prompts import SamplePrompt
from library.samples.sampler import SamplingNetworks, draw_latents_together, picture_of_latents
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file

SAMPLER, NUM_INFERENCE_STEPS, GUIDANCE_SCALE = "euler_a", 12, 4.0
SCENES_PER_PAIR = 8
BATCH_SIZE = 32
CONTENT_QUESTIONS = tuple(name for name in QUESTIONS if name != "style")


@dataclass(frozen=True)
class Figures:
    """Figures for prompts with pairs of style and shape that are not in the training set, each a fraction.

    Content is four questions (shape, colour, place, background), each of which counts a quarter.
    """

    style_right: float
    """Images in the requested style."""
    content_right: float
    """Answers to the four questions that match the prompt."""
    content_changed: float
    """Answers that change when only the style words change. 0 is best."""
    style_changed: float
    """Images whose style changes when only the content words change. 0 is best."""

    def __str__(self) -> str:
        return (
            f"style right {self.style_right:4.0%}   content right {self.content_right:4.0%}"
            f"   style words change content {self.content_changed:4.0%}"
            f"   content words change style {self.style_changed:4.0%}"
        )


@dataclass(frozen=True)
class Readings:
    """What the classifier reads in three images of each scene, drawn from the same noise, and the right answers."""

    wanted: Sequence[Reading]
    asked: Sequence[Reading]
    """Read in the image of the scene itself."""
    other_style: Sequence[Reading]
    """Read in the image with other style words."""
    other_content: Sequence[Reading]
    """Read in the image with other content words."""

    def figures(self) -> Figures:
        """Return the four figures."""
        return Figures(
            style_right=_mean(_same("style", self.asked, self.wanted)),
            content_right=_mean([agreement(*pair) for pair in zip(self.asked, self.wanted, strict=True)]),
            content_changed=1 - _mean([agreement(*pair) for pair in zip(self.asked, self.other_style, strict=True)]),
            style_changed=1 - _mean(_same("style", self.asked, self.other_content)),
        )

    def details(self) -> dict[str, float]:
        """Return the parts of two figures, as fractions: style right for each style, content for each question."""
        right = _same("style", self.asked, self.wanted)
        of_style = {
            style: _mean([one for one, want in zip(right, self.wanted, strict=True) if want.style == style])
            for style in dict.fromkeys(want.style for want in self.wanted)
        }
        return (
            {f"style right: {style}": value for style, value in of_style.items()}
            | {f"{name} right": _mean(_same(name, self.asked, self.wanted)) for name in CONTENT_QUESTIONS}
            | {f"{name} changed": 1 - _mean(_same(name, self.asked, self.other_style)) for name in CONTENT_QUESTIONS}
        )


def measure(model: Path, *, joint: bool, scenes_per_pair: int = SCENES_PER_PAIR, seed: int = 0) -> Readings:
    """Return what the classifier reads in images of a model file; with `joint`, both encoders read one prompt.

    For each scene, all of `HELD_OUT` pairs, three images are drawn from the same noise: the scene itself, the scene in
    another style, and another content in its style.
    """
    networks = load_networks(model)
    generator = random.Random(seed)
    scenes = held_out_scenes(scenes_per_pair, generator)
    other_styles = [replace(scene, style=_other_style(scene, generator)) for scene in scenes]
    other_contents = [replace(random_scene(generator, magnitudes=MAGNITUDES), style=scene.style) for scene in scenes]
    seeds = range(1000, 1000 + len(scenes))
    drawn = [read_drawn(networks, each, seeds, joint=joint) for each in (scenes, other_styles, other_contents)]
    return Readings([reading_of(scene) for scene in scenes], *drawn)


def load_networks(model: Path) -> SamplingNetworks:
    """Return the networks of a model file in float32."""
    whole = torch.float32
    read = read_single_file(model, ModelDtypes(unet=whole, vae=whole, text_encoder_l=whole, text_encoder_g=whole))
    return SamplingNetworks(read.unet, read.vae, read.text_encoder_l, read.text_encoder_g)


def held_out_scenes(scenes_per_pair: int, generator: random.Random) -> list[Scene]:
    """Return random scenes of the pairs of style and shape that the training set lacks, equally many of each."""
    pairs = [pair for pair in HELD_OUT for _ in range(scenes_per_pair)]
    return [replace(random_scene(generator, magnitudes=MAGNITUDES), style=style, shape=shape) for style, shape in pairs]


def prompt_of(scene: Scene, *, joint: bool) -> SamplePrompt:
    """Return the prompt for a scene, worded like the training captions."""
    prompt_l, prompt_g = (scene.joint_caption,) * 2 if joint else (scene.style_caption, scene.content)
    return SamplePrompt(
        prompt_g=prompt_g, prompt_l=prompt_l, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS
    )


def draw_all(networks: SamplingNetworks, prompts: Sequence[SamplePrompt], seeds: Sequence[int]) -> list[Image.Image]:
    """Return a square image for each prompt, drawn in batches; one with NaN is replaced by grey."""
    width, height = SIZES[0]
    images = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        latents = draw_latents_together(
            networks, prompts[batch], sampler=SAMPLER, width=width, height=height, seeds=seeds[batch]
        )
        drawn = [picture_of_latents(networks, each[None]) for each in latents]
        images += [image or Image.new("RGB", (width, height), "grey") for image in drawn]
    return images


def read_drawn(
    networks: SamplingNetworks, scenes: Sequence[Scene], seeds: Sequence[int], *, joint: bool
) -> list[Reading]:
    """Draw an image of each scene and return what the classifier reads in it."""
    prompts = [prompt_of(scene, joint=joint) for scene in scenes]
    return read_images(load_classifier(), draw_all(networks, prompts, seeds))


def agreement(one: Reading, other: Reading) -> float:
    """Return the fraction of the four content questions with equal answers."""
    return _mean([getattr(one, name) == getattr(other, name) for name in CONTENT_QUESTIONS])


def mean_figures(figures: Sequence[Figures]) -> Figures:
    """Return the mean of each figure."""
    return Figures(*(_mean([getattr(each, field.name) for each in figures]) for field in fields(Figures)))


def _other_style(scene: Scene, generator: random.Random) -> str:
    return generator.choice([style for style in STYLES if style != scene.style])


def _same(question: str, some: Sequence[Reading], others: Sequence[Reading]) -> list[bool]:
    """Return for each image whether the answers to a question are equal."""
    return [getattr(one, question) == getattr(other, question) for one, other in zip(some, others, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help=".safetensors files of the tiny SDXL, fine-tuned or not")
    parser.add_argument("--joint", action="store_true", help="one prompt of style and content for both encoders")
    parser.add_argument("--scenes_per_pair", type=int, default=SCENES_PER_PAIR)
    parser.add_argument("--save", type=Path, help="text file to write the figures to")
    arguments = parser.parse_args(argv)
    if arguments.scenes_per_pair < 1:
        parser.error(f"--scenes_per_pair is {arguments.scenes_per_pair}; it must be 1 or more")
    torch.set_num_threads(1)
    lines = []
    for model in arguments.models:
        figures = measure(model, joint=arguments.joint, scenes_per_pair=arguments.scenes_per_pair).figures()
        lines += [str(model), f"  {figures}"]
        print(*lines[-2:], sep="\n", flush=True)
    if arguments.save is not None:
        write_text(arguments.save, "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
