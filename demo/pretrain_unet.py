"""The second part of the pretraining: text encoders and U-Net, together, on the latents of drawn pictures."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm, trange

from demo.pictures import PLACES, Scene, draw, random_scene
from demo.pretrain_vae import warm_cosine
from demo.shallow import without_deep_blocks
from library.data.latent_preparation import pixels_to_tensor
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.images.buckets import BucketAssignment, BucketRule
from library.images.crops import true_crop_ltrb
from library.images.resizing import resize_and_crop
from library.sdxl.architecture import LATENT_SCALE, SdxlModel
from library.sdxl.latents import encode_pixels
from library.sdxl.size_conditioning import size_conditioning
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import TextConditioning, encode_captions
from library.sdxl.tokenizers import tokenize_captions

PARTS = ("unet", "text_encoder_l", "text_encoder_g")
"""Of a model, that are trained here."""
BUCKETS = BucketRule(Size(96, 96), min_bucket_reso=64, max_bucket_reso=128, bucket_reso_steps=32, no_upscale=False)
ORIGINAL_SIZES = ((96, 96), (144, 144), (108, 96), (128, 64), (192, 100), (64, 128), (96, 180))
"""Width and height of the drawings; `BUCKETS` says what becomes of them."""
BATCH_PICTURES = 8
DRAWS_PER_IMAGE = 3
"""Noise and timesteps that each picture of a batch meets at once: its captions are encoded only once."""
PEAK_RATE = 1.5e-3
EMA_DECAY = 0.998
STEPS_BETWEEN_SAVES = 250
EMBEDDING_DEVIATION = 0.3
"""Of the initial token embeddings: the U-Net is to tell words apart from its first step."""
IDLE_WORDS = (
    *("photographic", "anime", "detailed", "soft", "vintage", "modern", "quiet", "cinematic", "abstract", "fine"),
    *("bright", "calm", "simple", "drawing", "poster", "print", "digital", "art", "sharp", "clean", "glossy", "matte"),
)
"""Words that mean nothing here. L meets them beside a caption of G, and learns that unknown words change nothing."""


@dataclass(frozen=True)
class Drawing:
    """A drawn picture, ready to be trained on: scaled latents [4, h, w]."""

    scene: Scene
    latents: torch.Tensor
    assignment: BucketAssignment


def make_drawings(vae: AutoencoderKL, num_drawings: int, seed: int) -> list[Drawing]:
    """Random plain scenes of all `ORIGINAL_SIZES`, resized and cropped to their buckets, and their latents."""
    generator = random.Random(seed)
    return [_make_drawing(vae, generator) for _ in trange(num_drawings, desc="drawings", mininterval=10)]


def train_text_and_unet(
    model: SdxlModel,
    drawings: Sequence[Drawing],
    num_steps: int,
    seed: int,
    save: Callable[[], None],
    max_seconds: float = math.inf,
) -> None:
    """Train both text encoders and the U-Net with the loss of SDXL; at its end `model` has their running averages.

    Its deep blocks are left out meanwhile, and must have been silenced before (demo/shallow.py).
    `save` is called now and then, while `model` has the averages. Where `max_seconds` would be over before the last
    step, the learning rate falls sooner and there are fewer steps.
    """
    noise_generator = torch.Generator().manual_seed(seed)
    trained = nn.ModuleDict({part: getattr(model, part) for part in PARTS}).train()
    averages = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    for step in _training_steps(model, drawings, num_steps, seed, noise_generator, max_seconds):
        averages.update_parameters(trained)
        if step % STEPS_BETWEEN_SAVES == 0:
            latest = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
            trained.load_state_dict(averages.module.state_dict())
            save()
            trained.load_state_dict(latest)
    trained.load_state_dict(averages.module.state_dict())
    trained.eval()


def _training_steps(
    model: SdxlModel,
    drawings: Sequence[Drawing],
    num_steps: int,
    seed: int,
    noise_generator: torch.Generator,
    max_seconds: float,
) -> Iterator[int]:
    """The optimizer steps, counted from 1, each done when it is asked for."""
    choice = random.Random(seed)
    by_bucket = _by_bucket(drawings)
    with without_deep_blocks(model):
        parameters = [parameter for part in PARTS for parameter in getattr(model, part).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    started = time.monotonic()
    mean_loss = 1.0
    bar = trange(1, num_steps + 1, desc="text encoders and U-Net", mininterval=10)
    for step in bar:
        done = max((step - 1) / num_steps, (time.monotonic() - started) / max_seconds)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = PEAK_RATE * warm_cosine(done)
        optimizer.zero_grad()
        with without_deep_blocks(model):
            loss = _loss(model, _draw_batch(by_bucket, choice), choice, noise_generator)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if step % STEPS_BETWEEN_SAVES == 0:
            tqdm.write(f"step {step}: loss {mean_loss:.4f}")
        yield step


@torch.no_grad()
def spread_embeddings(model: SdxlModel, generator: torch.Generator) -> None:
    """Draw the token embeddings of both encoders again, with `EMBEDDING_DEVIATION`."""
    for encoder in (model.text_encoder_l, model.text_encoder_g):
        encoder.get_input_embeddings().weight.normal_(std=EMBEDDING_DEVIATION, generator=generator)


@torch.no_grad()
def soften_residuals(model: SdxlModel) -> None:
    """Let the U-Net's 70 transformer blocks and its residual blocks add little at first: deep networks begin better."""
    for name, layer in model.unet.named_modules():
        if isinstance(layer, ResnetBlock2D):
            nn.init.zeros_(layer.conv2.weight)
        elif name.endswith(("proj_out", "to_out.0", "ff.net.2")):  # what a transformer adds, whole and part by part
            layer.weight *= 0.2


def caption_pair(scene: Scene, choice: random.Random) -> tuple[str, str]:
    """The captions for L and G: mostly the same for both, as SDXL was trained; sometimes one or both say nothing.

    Without these a fine-tune could not part what L says from what G says, and there would be no guidance.
    """
    caption = partial_caption(scene, choice)
    kind = choice.random()
    if kind < 0.1:
        return "", ""
    if kind < 0.2:
        return "", caption
    if kind < 0.3:
        return caption, ""
    if kind < 0.4:
        return ", ".join(choice.sample(IDLE_WORDS, choice.randint(1, 2))), caption
    return caption, caption


def partial_caption(scene: Scene, choice: random.Random) -> str:
    """The scene in words, some of which are left out, so that shorter prompts work too."""
    where, _ = PLACES[scene.place]
    words = ["a", scene.magnitude, scene.colour, scene.shape, where]
    kept = [word for word in words if word in (scene.colour, scene.shape, "a") or choice.random() < 0.85]
    background = f", {scene.background} background" if choice.random() < 0.85 else ""
    return " ".join(kept) + background


def _make_drawing(vae: AutoencoderKL, generator: random.Random) -> Drawing:
    scene = random_scene(generator, size=generator.choice(ORIGINAL_SIZES))
    assignment = BUCKETS.assign(Size(*scene.size))
    pixels = pixels_to_tensor(resize_and_crop(draw(scene), assignment.resized, assignment.bucket))
    return Drawing(scene, encode_pixels(vae, pixels[None])[0] * LATENT_SCALE, assignment)


def _by_bucket(drawings: Sequence[Drawing]) -> dict[Size, list[Drawing]]:
    by_bucket: dict[Size, list[Drawing]] = {}
    for drawing in drawings:
        by_bucket.setdefault(drawing.assignment.bucket, []).append(drawing)
    return by_bucket


def _draw_batch(by_bucket: dict[Size, list[Drawing]], choice: random.Random) -> list[Drawing]:
    """Pictures of one bucket; the buckets come as often as their pictures are many."""
    sizes = [len(drawings) for drawings in by_bucket.values()]
    (drawings,) = choice.choices(list(by_bucket.values()), weights=sizes)
    return choice.sample(drawings, BATCH_PICTURES)


def _loss(
    model: SdxlModel, batch: Sequence[Drawing], choice: random.Random, noise_generator: torch.Generator
) -> torch.Tensor:
    """The mean loss of a batch of B pictures, each with `DRAWS_PER_IMAGE` draws of noise and timestep."""
    captions_l, captions_g = zip(*(caption_pair(drawing.scene, choice) for drawing in batch), strict=True)
    text = encode_captions(model.text_encoder_l, model.text_encoder_g, tokenize_captions(captions_l, captions_g, 1))
    text = TextConditioning(*(tensor.repeat(DRAWS_PER_IMAGE, *[1] * (tensor.dim() - 1)) for tensor in text))
    sizes = _sizes(batch).repeat(DRAWS_PER_IMAGE, 1)
    latents = torch.stack([drawing.latents for drawing in batch]).repeat(DRAWS_PER_IMAGE, 1, 1, 1)
    objective = Objective(NoiseOptions())
    noisy = objective.draw(latents, [noise_generator])
    predicted = model.unet(
        noisy.latents,
        noisy.timesteps,
        encoder_hidden_states=text.hidden,
        added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
    ).sample
    return objective.losses(predicted, latents, noisy).mean()


def _sizes(batch: Sequence[Drawing]) -> torch.Tensor:
    """The six sizes of each picture, [B, 6]."""
    original, crop, target = [], [], []
    for drawing in batch:
        bucket, resized, _ = drawing.assignment
        left, top, _, _ = true_crop_ltrb(bucket, resized)
        width, height = drawing.scene.size
        original.append((height, width))
        crop.append((top, left))
        target.append((bucket.height, bucket.width))
    return size_conditioning(torch.tensor(original), torch.tensor(crop), torch.tensor(target))
