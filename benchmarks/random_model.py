"""SDXL with random weights drawn on the device; no file is read."""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch
from torch.utils.flop_counter import FlopCounterMode

from library.sdxl.architecture import Architecture, SdxlModel, empty_model, empty_unet
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT

_POOL_SIZE = 2**24
_TEXT_TOKENS = 77
_NUM_SIZES = 6


def random_model(architecture: Architecture, dtypes: ModelDtypes, device: torch.device) -> SdxlModel:
    """Return a model on `device` in evaluation mode; parts without a precision in `dtypes` are bfloat16."""
    model = empty_model(architecture)
    generator = torch.Generator(device).manual_seed(0)
    pool = torch.randn(_POOL_SIZE, generator=generator, device=device, dtype=torch.bfloat16)
    for network, dtype in (
        (model.unet, dtypes.unet),
        (model.vae, dtypes.vae),
        (model.text_encoder_l, dtypes.text_encoder_l),
        (model.text_encoder_g, dtypes.text_encoder_g),
    ):
        weights = {
            name: _drawn(name, tuple(parameter.shape), pool).to(dtype or torch.bfloat16)
            for name, parameter in network.named_parameters()
        }
        network.load_state_dict(weights, strict=False, assign=True)
        network.to(device).eval()  # the buffers too
    return model


def _drawn(name: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    """Return weights that preserve the scale of activations: matrices from the pool, norms the identity."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=pool.device, dtype=pool.dtype)
    deviation = 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
    weight = torch.empty(shape, device=pool.device, dtype=pool.dtype)
    for part in weight.view(-1).split(_POOL_SIZE):
        torch.mul(pool[: part.numel()], deviation, out=part)
    return weight


def forward_flops(architecture: Architecture, width: int, height: int) -> int:
    """Return the floating-point operations of the U-Net's forward pass for one image, counted without computing it."""
    unet = empty_unet(architecture)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**unet_inputs(architecture, width, height, batch_size=1, dtype=torch.float32))
    return counter.get_total_flops()


def unet_inputs(
    architecture: Architecture, width: int, height: int, batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of a U-Net without weights: meta tensors, for images of width x height pixels."""
    meta = torch.device("meta")
    height_cells, width_cells = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    text_width, pooled_width = architecture.unet["cross_attention_dim"], architecture.text_encoder_g["projection_dim"]
    return {
        "sample": torch.empty(batch_size, LATENT_CHANNELS, height_cells, width_cells, device=meta, dtype=dtype),
        "timestep": torch.empty(batch_size, dtype=torch.int64, device=meta),
        "encoder_hidden_states": torch.empty(batch_size, _TEXT_TOKENS, text_width, device=meta, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(batch_size, pooled_width, device=meta, dtype=dtype),
            "time_ids": torch.empty(batch_size, _NUM_SIZES, device=meta),
        },
    }
