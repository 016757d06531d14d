"""One table, read in both directions: the tensors of an SDXL single file and the parameters that they fill."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

PREFIX_UNET = "model.diffusion_model."
PREFIX_VAE = "first_stage_model."
PREFIX_L = "conditioner.embedders.0.transformer.text_model."
PREFIX_G = "conditioner.embedders.1.model."
LOGIT_SCALE = PREFIX_G + "logit_scale"
TEXT_PROJECTION = PREFIX_G + "text_projection"


class Form(Enum):
    """The form in which a tensor of the file holds the parameters of the network."""

    SAME = "as it is"
    TRANSPOSED = "OpenCLIP's `x @ text_projection` against a linear layer's `x @ weight.T`"
    POINTWISE = "a linear layer stored as a 1x1 convolution"
    STACKED = "query, key and value one under the other"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the single file: its name there, the parameters it fills and the form it has."""

    name: str
    parameters: tuple[str, ...]
    form: Form = Form.SAME

    def to_parameters(self, tensor: torch.Tensor) -> Iterable[torch.Tensor]:
        """Return the tensors of `parameters`, in order (views of `tensor`)."""
        match self.form:
            case Form.SAME:
                return (tensor,)
            case Form.TRANSPOSED:
                return (tensor.T,)
            case Form.POINTWISE:
                return (tensor.reshape(tensor.shape[0], tensor.shape[1]),)
            case Form.STACKED:
                return tensor.chunk(len(self.parameters))

    def from_parameters(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the tensor of the file; the inverse of `to_parameters`."""
        match self.form:
            case Form.SAME:
                return tensors[0]
            case Form.TRANSPOSED:
                return tensors[0].T
            case Form.POINTWISE:
                return tensors[0][:, :, None, None]
            case Form.STACKED:
                return torch.cat(tensors)


# -- U-Net ------------------------------------------------------------------------------------------------------------

_UNET_PLAIN = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_LAYERS = 2  # resnets in a level going down; one more going up


@functools.cache
def _unet_modules() -> dict[str, str]:
    """Return the names in diffusers and in the single file of the modules of SDXL's U-Net."""
    modules = dict(_UNET_PLAIN)
    for level in range(3):
        first = 1 + level * (_UNET_LAYERS + 1)
        for layer in range(_UNET_LAYERS):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + _UNET_LAYERS}.0.op"
        first = level * (_UNET_LAYERS + 1)
        for layer in range(_UNET_LAYERS + 1):
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + _UNET_LAYERS}.2.conv"
    return modules


@functools.cache
def unet_name(parameter: str) -> str:
    """Return the single file's name (without its prefix) of a parameter of diffusers' U-Net.

    >>> unet_name("down_blocks.1.resnets.0.conv1.weight")
    'input_blocks.4.0.in_layers.2.weight'
    """
    parts = parameter.split(".")
    modules = _unet_modules()
    depth = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
    module, inner = modules[".".join(parts[:depth])], parts[depth:]
    if "resnets" in parts[:depth]:
        inner = [_UNET_RESNET[inner[0]], *inner[1:]]
    return ".".join([module, *inner])


# -- VAE --------------------------------------------------------------------------------------------------------------

_VAE_RULES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_VAE_LAST_LEVEL = 3


@functools.cache
def vae_name(parameter: str) -> str:
    """Return the single file's name (without its prefix) of a parameter of diffusers' VAE.

    The file counts the decoder's levels from the image, diffusers from the latents.
    """
    for pattern, replacement in _VAE_RULES:
        parameter = re.sub(pattern, replacement, parameter)
    return re.sub(r"\bup\.(\d)", lambda level: f"up.{_VAE_LAST_LEVEL - int(level[1])}", parameter)


# -- text encoders ----------------------------------------------------------------------------------------------------

_G_RULES = (
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.q_proj\.", ".attn.in_proj_"),
)


def _without_wrapper(parameter: str) -> str:
    """Return the name inside the text tower: some releases of transformers put `text_model.` before it."""
    return parameter.removeprefix("text_model.")


@functools.cache
def _stored_g(parameter: str) -> StoredTensor | None:
    if ".k_proj." in parameter or ".v_proj." in parameter:
        return None  # part of the stacked tensor that q_proj names
    name = _without_wrapper(parameter)
    for pattern, replacement in _G_RULES:
        name = re.sub(pattern, replacement, name)
    if ".q_proj." in parameter:
        stacked = tuple(parameter.replace(".q_proj.", f".{part}_proj.") for part in "qkv")
        return StoredTensor(PREFIX_G + name, stacked, Form.STACKED)
    form = Form.TRANSPOSED if name == "text_projection" else Form.SAME
    return StoredTensor(PREFIX_G + name, (parameter,), form)


# -- the tables -------------------------------------------------------------------------------------------------------


def unet_table(unet: nn.Module) -> list[StoredTensor]:
    """Return the single file's tensors of the U-Net."""
    return [StoredTensor(PREFIX_UNET + unet_name(name), (name,)) for name in unet.state_dict()]


def vae_table(vae: nn.Module) -> list[StoredTensor]:
    """Return the single file's tensors of the VAE; its attention's linear layers are stored as 1x1 convolutions."""
    return [
        StoredTensor(
            PREFIX_VAE + vae_name(name),
            (name,),
            Form.POINTWISE if ".attentions." in name and tensor.ndim == 2 else Form.SAME,
        )
        for name, tensor in vae.state_dict().items()
    ]


def text_encoder_l_table(text_encoder_l: nn.Module) -> list[StoredTensor]:
    """Return the single file's tensors of the L encoder."""
    return [StoredTensor(PREFIX_L + _without_wrapper(name), (name,)) for name in text_encoder_l.state_dict()]


def text_encoder_g_table(text_encoder_g: nn.Module) -> list[StoredTensor]:
    """Return the single file's tensors of the G encoder, in OpenCLIP's names."""
    stored = (_stored_g(name) for name in text_encoder_g.state_dict())
    return [tensor for tensor in stored if tensor is not None]
