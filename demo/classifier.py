"""A small network that recognizes shape, colour, place, background and style in an image of the demo.

python demo/classifier.py demo/classifier.safetensors      train it on drawn images, three minutes on one core

Half of its training images have passed through the tiny SDXL's VAE, and all are slightly blurred, tinted and noisy, so
that it reads images of the model as well as drawings.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import trange

from demo.pictures import BACKGROUNDS, COLOURS, PLACES, PLAIN, SHAPES, SIZES, STYLES, Scene, draw, random_scene
from library.data.latent_preparation import pixels_to_tensor
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import decode_latents, encode_pixels

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "style": (PLAIN, *STYLES),
}
"""Each question about an image, with its possible answers."""
WEIGHTS = Path(__file__).with_name("classifier.safetensors")
MODEL = Path(__file__).with_name("tiny_sdxl.safetensors")
SIDE = 64
"""Width and height of the network's input in pixels; every image is resized to it."""
NUM_IMAGES = 6000
NUM_STEPS = 2000
BATCH_SIZE = 48
PEAK_RATE = 2e-3


@dataclass(frozen=True)
class Reading:
    """The classifier's answers for one image, in the words of demo/pictures.py."""

    shape: str
    colour: str
    place: str
    background: str
    style: str

    @property
    def content(self) -> tuple[str, str, str, str]:
        """Every answer except the style."""
        return self.shape, self.colour, self.place, self.background


class Classifier(nn.Module):
    """Four convolutions of stride 2, and a linear layer for each question."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 24, 48, 64, 64)
        self.features = nn.Sequential(
            *(_halving(inputs, outputs) for inputs, outputs in itertools.pairwise(channels)), nn.Flatten()
        )
        width = channels[-1] * (SIDE // 16) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(answers)) for name, answers in QUESTIONS.items()})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits [B, answers] of each question for pixels [B, 3, SIDE, SIDE] in -1..1."""
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """Return the trained classifier."""
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval()


@torch.no_grad()
def read_images(classifier: Classifier, images: Sequence[Image.Image]) -> list[Reading]:
    """Return the answers for each image, which may have any size."""
    logits = classifier(torch.stack([_small(image) for image in images]))
    chosen = {name: [QUESTIONS[name][index] for index in each.argmax(dim=1)] for name, each in logits.items()}
    return [Reading(**{name: answers[index] for name, answers in chosen.items()}) for index in range(len(images))]


def reading_of(scene: Scene) -> Reading:
    """Return the right answers for an image of the scene."""
    return Reading(scene.shape, scene.colour, scene.place, scene.background, scene.style)


# -- training ---------------------------------------------------------------------------------------------------------


def train_classifier(pixels: torch.Tensor, scenes: Sequence[Scene], seed: int) -> Classifier:
    """Return a classifier trained on pixels [N, 3, SIDE, SIDE] of the scenes."""
    torch.manual_seed(seed)
    classifier = Classifier().train()
    answers = {
        name: torch.tensor([possible.index(getattr(scene, name)) for scene in scenes])
        for name, possible in QUESTIONS.items()
    }
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for _ in trange(NUM_STEPS, desc="classifier", mininterval=10):
        chosen = torch.randint(len(pixels), (BATCH_SIZE,))
        logits = classifier(_disturbed(pixels[chosen]))
        losses = [cross_entropy(each, answers[name][chosen], label_smoothing=0.05) for name, each in logits.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def drawn_examples(num_images: int, seed: int) -> tuple[list[Image.Image], list[Scene]]:
    """Return random scenes of all styles and sizes, about a third of them plain, and their drawings."""
    generator = random.Random(seed)
    scenes = [
        random_scene(generator, (PLAIN,) if generator.random() < 0.35 else STYLES, generator.choice(SIZES))
        for _ in range(num_images)
    ]
    return [draw(scene) for scene in scenes], scenes


@torch.no_grad()
def through_vae(images: Sequence[Image.Image], model: Path) -> list[Image.Image]:
    """Return the images as the VAE of `model` reconstructs them."""
    vae = read_vae(model, torch.float32)
    rebuilt = [decode_latents(vae, encode_pixels(vae, _pixels(image)[None]))[0] for image in images]
    arrays = [((each.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy() for each in rebuilt]
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def accuracies(classifier: Classifier, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the fraction of right answers to each question."""
    pairs = list(zip(read_images(classifier, images), map(reading_of, scenes), strict=True))
    return {
        name: sum(getattr(read, name) == getattr(true, name) for read, true in pairs) / len(pairs) for name in QUESTIONS
    }


def _halving(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def _pixels(image: Image.Image) -> torch.Tensor:
    return pixels_to_tensor(np.array(image))


def _small(image: Image.Image) -> torch.Tensor:
    """Return pixels [3, SIDE, SIDE] in -1..1 of the whole image, resized to a square."""
    return _pixels(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _disturbed(pixels: torch.Tensor) -> torch.Tensor:
    """Return the pixels tinted and noisy, and in half of the batches blurred."""
    if torch.rand(()) < 0.5:
        coarse = int(torch.randint(SIDE * 5 // 8, SIDE, ()))
        pixels = interpolate(interpolate(pixels, (coarse, coarse), mode="area"), (SIDE, SIDE), mode="bilinear")
    tint = 0.08 * torch.randn(len(pixels), 3, 1, 1)
    noise = 0.08 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
    return (pixels + tint + noise).clamp(-1, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, write the weights, and report the accuracy on new images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", type=Path, default=MODEL, help="model whose VAE is used")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, scenes = drawn_examples(NUM_IMAGES, arguments.seed)
    half = NUM_IMAGES // 2
    seen = [*images[:half], *through_vae(images[half:], arguments.model)]
    classifier = train_classifier(torch.stack([_small(image) for image in seen]), scenes, arguments.seed)
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, arguments.path)
    images, scenes = drawn_examples(1000, arguments.seed + 1)
    for kind, shown in (("drawings", images), ("VAE's reconstructions", through_vae(images, arguments.model))):
        right = ", ".join(f"{name} {part:.1%}" for name, part in accuracies(classifier, shown, scenes).items())
        print(f"accuracy on 1000 new {kind}: {right}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
