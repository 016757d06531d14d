"""Train a deep SDXL as a shallow one: most of its transformer blocks return their input, and are left out in training.

SDXL has 70 transformer blocks in the U-Net and 44 in its text encoders: far more than drawn shapes need, and most of
the time of a step. A block whose two or three output layers are zero adds nothing to its input, so that the deep
network computes exactly what the shallow one computes, and its blocks can still learn in a fine-tune.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPEncoderLayer

from library.sdxl.architecture import SdxlModel

ACTIVE_IN_UNET = 1
"""Active blocks in each of the eleven transformers of the U-Net, which have two or ten blocks."""
ACTIVE_IN_TEXT_ENCODER = 3
"""Active blocks at the start of a text encoder. The last one is active too; only G's pooled vector depends on it."""


@torch.no_grad()
def silence_deep_blocks(model: SdxlModel) -> None:
    """Set the output layers of all inactive blocks to zero, so that they return their input."""
    for owner in _stacks(model):
        active = set(_active(owner))
        for block in [block for block in _blocks(owner) if block not in active]:
            for layer in _output_layers(block):
                for parameter in layer.parameters():
                    parameter.zero_()


@contextmanager
def without_deep_blocks(model: SdxlModel) -> Iterator[None]:
    """Leave out the inactive blocks of the networks within this context; they are restored afterwards."""
    owners = _stacks(model)
    whole = [_blocks(owner) for owner in owners]
    for owner in owners:
        _set_blocks(owner, nn.ModuleList(_active(owner)))
    try:
        yield
    finally:
        for owner, blocks in zip(owners, whole, strict=True):
            _set_blocks(owner, blocks)


def _stacks(model: SdxlModel) -> list[nn.Module]:
    """Return the modules that hold a list of transformer blocks."""
    networks = (model.unet, model.text_encoder_l, model.text_encoder_g)
    return [
        layer
        for network in networks
        for layer in network.modules()
        if isinstance(layer, Transformer2DModel | CLIPEncoder)
    ]


def _blocks(owner: nn.Module) -> nn.ModuleList:
    blocks = owner.transformer_blocks if isinstance(owner, Transformer2DModel) else owner.layers
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _set_blocks(owner: nn.Module, blocks: nn.ModuleList) -> None:
    if isinstance(owner, Transformer2DModel):
        owner.transformer_blocks = blocks
    else:
        owner.layers = blocks


def _active(owner: nn.Module) -> list[nn.Module]:
    blocks = _blocks(owner)
    if isinstance(owner, Transformer2DModel):
        return list(blocks[:ACTIVE_IN_UNET])
    return [*blocks[:ACTIVE_IN_TEXT_ENCODER], blocks[-1]]


def _output_layers(block: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs a block adds to its input."""
    if isinstance(block, BasicTransformerBlock):
        assert block.attn2 is not None
        return [block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]]
    assert isinstance(block, CLIPEncoderLayer)
    return [block.self_attn.out_proj, block.mlp.fc2]
