"""Write an SDXL single file with random weights: the real layout without a download.

python demo/random_sdxl.py tiny.safetensors              a tiny SDXL for tests, 8 MB, a second
python demo/random_sdxl.py sd_xl.safetensors --size full  the full size, 6.9 GB, a minute or two
"""

import argparse
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch

from library.sdxl.architecture import (
    ARCHITECTURE_KEY,
    SDXL_BASE,
    Architecture,
    empty_model,
    make_architecture,
)
from library.sdxl.checkpoint_file import tensors_to_write
from library.sdxl.tensor_file import write_safetensors

TINY = make_architecture(
    unet_channels=(16, 32, 48),
    unet_heads=(1, 2, 3),
    vae_channels=(8, 16, 24, 24),
    width_l=32,
    heads_l=2,
    width_g=48,
    heads_g=3,
    norm_num_groups=8,
)
"""SDXL's structure with small widths: every tensor name of the real file."""


def write_random_sdxl(path: Path, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
    """Write a checkpoint in which each tensor is drawn from `seed` and its name; needs memory for one tensor.

    Matrices preserve the scale of their input (deviation 1 / sqrt(inputs)), norms are the identity and biases zero, so
    that nothing overflows in float16.
    """
    tensors = [
        replace(tensor, make=partial(_draw, tensor.name, tensor.shape, seed)) if tensor.shape else tensor
        for tensor in tensors_to_write(empty_model(architecture), dtype)
    ]
    metadata = {} if architecture == SDXL_BASE else {ARCHITECTURE_KEY: architecture.to_json()}
    write_safetensors(path, tensors, metadata)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    if "embedding" in name:
        return torch.randn(shape, generator=generator) * 0.02
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    architecture = SDXL_BASE if arguments.size == "full" else TINY
    write_random_sdxl(arguments.path, architecture, torch.float16, arguments.seed)
    print(f"{arguments.path}: {arguments.path.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
