"""The effect of Adafactor's `flatten_convolutions` on learning: the same U-Net trained with and without it.

    python benchmarks/flat_convolutions.py [--num_steps 300] [--seeds 0 1 2]

The U-Net of the tiny SDXL, with one transformer block in place of two or ten, since these have no convolutions, learns
from random weights to denoise thumbnails of the demo's images, 16x16 cells, with SDXL's noise schedule and float32
weights. Its loss is measured on held-out images and noise.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from benchmarks.ceilings import machine
from benchmarks.result_files import RESULTS, machine_line, write_result
from demo.pictures import draw, random_scene
from demo.random_sdxl import TINY
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.optim.adafactor import Adafactor

_FEW_BLOCKS = {"transformer_layers_per_block": [1, 1, 1]}
_CELLS = 16
_BATCH_SIZE = 8
_LEARNING_RATE = 1e-3
_NUM_IMAGES, _NUM_HELD_OUT = 160, 32


def thumbnails(num_images: int) -> torch.Tensor:
    """Return drawn images as [N, 4, 16, 16]: red, green, blue and grey, of mean 0 and standard deviation 1."""
    generator = random.Random(0)
    small = [draw(random_scene(generator)).resize((_CELLS, _CELLS)) for _ in range(num_images)]
    colours = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in small])).movedim(-1, 1)
    cells = torch.cat([colours, colours.mean(dim=1, keepdim=True)], dim=1)
    return (cells - cells.mean()) / cells.std()


def loss_of(unet: UNet2DConditionModel, cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the mean loss [] of `cells` [B, 4, 16, 16] with noise and timesteps from `generator`."""
    batch_size = len(cells)
    objective = Objective(NoiseOptions())
    noisy = objective.draw(cells, [generator])
    predicted = unet(
        noisy.latents,
        noisy.timesteps,
        encoder_hidden_states=torch.zeros(batch_size, 1, unet.config.cross_attention_dim),
        added_cond_kwargs={
            "text_embeds": torch.zeros(batch_size, TINY.text_encoder_g["projection_dim"]),
            "time_ids": torch.zeros(batch_size, 6),
        },
    ).sample
    return objective.losses(predicted, cells, noisy).mean()


def trained_loss(images: torch.Tensor, *, flatten: bool, num_steps: int, seed: int) -> float:
    """Return the loss on held-out images after training on the others."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(TINY.unet | _FEW_BLOCKS)
    optimizer = Adafactor(
        unet.parameters(),
        lr=_LEARNING_RATE,
        scale_parameter=False,
        relative_step=False,
        flatten_convolutions=flatten,
    )
    learnt, held_out = images[:-_NUM_HELD_OUT], images[-_NUM_HELD_OUT:]
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in tqdm(range(num_steps), desc=f"flatten_convolutions={flatten}, seed {seed}", leave=False):
        batch = learnt[order.sample(range(len(learnt)), _BATCH_SIZE)]
        loss_of(unet, batch, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        return float(torch.stack([loss_of(unet, held_out, fixed) for _ in range(4)]).mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    images = thumbnails(_NUM_IMAGES)
    lines = [
        machine_line(machine()),
        f"loss on held-out images after {arguments.num_steps} steps of Adafactor at {_LEARNING_RATE}",
        f"{'seed':<8}{'kernel by kernel':>18}{'flattened':>12}",
    ]
    rows = []
    for seed in arguments.seeds:
        usual, flat = (
            trained_loss(images, flatten=flatten, num_steps=arguments.num_steps, seed=seed) for flatten in (False, True)
        )
        rows.append({"seed": seed, "kernel_by_kernel": usual, "flattened": flat})
        lines.append(f"{seed:<8}{usual:18.4f}{flat:12.4f}")
    print("\n".join(lines))
    result = {"machine": machine(), "num_steps": arguments.num_steps, "rows": rows}
    write_result(RESULTS / "flat_convolutions", result, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
