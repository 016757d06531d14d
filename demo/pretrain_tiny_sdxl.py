"""Train the tiny SDXL of the demo from scratch, on images that demo/pictures.py draws.

python demo/pretrain_tiny_sdxl.py demo/tiny_sdxl.safetensors              an hour and a half on one core
python demo/pretrain_tiny_sdxl.py tiny.safetensors --vae demo/tiny_sdxl.safetensors     keep that file's VAE
python demo/pretrain_tiny_sdxl.py tiny.safetensors --start demo/tiny_sdxl.safetensors   continue from that file
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from demo.pictures import PLAIN, SIZES, STYLES, draw, random_scene
from demo.pretrain_unet import make_drawings, soften_residuals, spread_embeddings, train_text_and_unet
from demo.pretrain_vae import fold_latent_statistics, signal_to_noise, train_vae
from demo.shallow import silence_deep_blocks
from library.config.errors import exits_on_user_error
from library.data.latent_preparation import pixels_to_tensor
from library.sdxl.architecture import DEFAULT_LOGIT_SCALE, Architecture, SdxlModel, make_architecture
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, read_vae, write_single_file
from library.sdxl.model_spec import ModelSpecOptions, model_spec

_NARROW = make_architecture(
    unet_channels=(32, 40, 40),
    unet_heads=(2, 2, 2),
    vae_channels=(8, 16, 32, 48),
    width_l=24,
    heads_l=2,
    width_g=32,
    heads_g=2,
    norm_num_groups=4,
)
TINY = replace(_NARROW, vae={**_NARROW.vae, "norm_num_groups": 1})
"""SDXL's structure, narrow enough for a file of 15 MB, a third of which is the two tables of 49408 tokens.

The VAE has one norm group: a group norm over few channels would remove the brightness and colour of a flat image.
"""
VAE_STEPS = 1800
UNET_STEPS = 4000
NUM_DRAWINGS = 2000


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train, and write the file."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.num_threads)
    model = first_model(arguments.start, arguments.seed)

    def save() -> None:
        write_single_file(arguments.path, model, torch.float16, header())

    if arguments.start is None and arguments.vae is None:
        train_vae(model.vae, arguments.vae_steps, arguments.seed)
        fold_latent_statistics(model.vae, drawn_pixels(256, seed=arguments.seed + 1))
        save()
    # Read from the file, so that the U-Net learns the latents of the rounded weights.
    model.vae = read_vae(arguments.start or arguments.vae or arguments.path, torch.float32)
    for styles in ((PLAIN,), STYLES):
        decibels = signal_to_noise(model.vae, drawn_pixels(64, seed=arguments.seed + 2, styles=styles))
        print(f"the VAE reconstructs {', '.join(styles)} to {decibels:.1f} dB", flush=True)
    drawings = make_drawings(model.vae, arguments.num_drawings, arguments.seed)
    seconds = 60 * arguments.max_minutes
    train_text_and_unet(model, drawings, arguments.unet_steps, arguments.seed, save, seconds)
    save()
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--vae", type=Path, help="take the VAE from this file instead of training it")
    parser.add_argument("--start", type=Path, help="continue from the networks of this file")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet_steps", type=int, default=UNET_STEPS)
    parser.add_argument("--max_minutes", type=float, default=math.inf, help="time limit for text encoders and U-Net")
    parser.add_argument("--num_drawings", type=int, default=NUM_DRAWINGS, help="drawings to train the U-Net on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, default=1, help="CPU cores to use")
    return parser.parse_args(argv)


def first_model(start: Path | None, seed: int) -> SdxlModel:
    """Return the networks of the file `start`, or newly initialized ones, in float32."""
    if start is not None:
        whole = torch.float32
        return read_single_file(start, ModelDtypes(unet=whole, vae=whole, text_encoder_l=whole, text_encoder_g=whole))
    torch.manual_seed(seed)
    model = new_model(TINY)
    spread_embeddings(model, torch.Generator().manual_seed(seed))
    soften_residuals(model)
    silence_deep_blocks(model)
    return model


def new_model(architecture: Architecture) -> SdxlModel:
    """Return the four networks with the initial weights of their libraries, in float32."""
    return SdxlModel(
        unet=UNet2DConditionModel.from_config(architecture.unet),
        vae=AutoencoderKL.from_config(architecture.vae),
        text_encoder_l=CLIPTextModel(CLIPTextConfig(**architecture.text_encoder_l)),
        text_encoder_g=CLIPTextModelWithProjection(CLIPTextConfig(**architecture.text_encoder_g)),
        architecture=architecture,
        logit_scale=torch.tensor(DEFAULT_LOGIT_SCALE),
    )


def drawn_pixels(num_images: int, *, seed: int, styles: Sequence[str] = (PLAIN,)) -> torch.Tensor:
    """Return square drawings [num_images, 3, 96, 96] in -1..1."""
    generator = random.Random(seed)
    images = [draw(random_scene(generator, styles)) for _ in range(num_images)]
    return torch.stack([pixels_to_tensor(np.array(image)) for image in images])


def header() -> dict[str, str]:
    """Return the header of the file."""
    return model_spec(
        ModelSpecOptions(),
        name="tiny SDXL",
        description="Tiny SDXL that draws coloured shapes, for demo and tests.",
        resolution=SIZES[0],
        timesteps=None,
        now=datetime.now(),
        source={},
    )


if __name__ == "__main__":
    sys.exit(main())
