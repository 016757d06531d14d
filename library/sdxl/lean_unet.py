"""The U-Net with fewer launches on a GPU: blocks without what SDXL does not use, and no autocast beside bfloat16.

Names, weights and files of the network stay as they are.
"""

from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional


def make_lean(unet: UNet2DConditionModel, *, without_autocast: bool) -> None:
    """Let the blocks of `unet` launch less; with `without_autocast` it computes in the precision it is held in.

    Autocast would cast every weight's input and compute norms in float32; in bfloat16 they add up in float32 too, and
    round once.
    """
    for module in unet.modules():
        if type(module) is ResnetBlock2D and _is_usual_residual(module):
            module.forward = MethodType(_residual, module)
        if isinstance(module, Attention) and _is_usual_attention(module):
            module.set_processor(LeanAttention())
    if without_autocast:
        unet.forward = _AsHeld(unet.forward)


def _is_usual_residual(block: ResnetBlock2D) -> bool:
    is_plain = block.upsample is None and block.downsample is None and block.time_embedding_norm == "default"
    return is_plain and block.output_scale_factor == 1.0 and block.time_emb_proj is not None


def _residual(block: ResnetBlock2D, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return what diffusers' block does, without its division by 1."""
    inner = block.conv1(block.nonlinearity(block.norm1(hidden)))
    inner = inner + block.time_emb_proj(block.nonlinearity(time))[:, :, None, None]
    inner = block.conv2(block.dropout(block.nonlinearity(block.norm2(inner))))
    shortcut: torch.Tensor = hidden if block.conv_shortcut is None else block.conv_shortcut(hidden.contiguous())
    return shortcut + inner


def _is_usual_attention(attention: Attention) -> bool:
    others = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    products = (attention.to_q, attention.to_k, attention.to_v)
    is_plain = not any(others) and not attention.residual_connection and attention.rescale_output_factor == 1.0
    return is_plain and all(product is not None and product.bias is None for product in products)


class LeanAttention:
    """Attention as diffusers computes it, with queries, keys and values in one product, and no division by 1.

    Of cross-attention keys and values are one product. The weights stay three tensors: they are put side by side at
    each call, which is one launch in place of two.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [B, S, C] for `hidden_states` [B, S, C] and the text's [B, T, D], if there is one."""
        if attention_mask is not None:
            masked: torch.Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return masked
        if encoder_hidden_states is None:
            query, key, value = _product(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            [query] = _product(attn, hidden_states, attn.to_q)
            key, value = _product(attn, encoder_hidden_states, attn.to_k, attn.to_v)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        projected: torch.Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return attn.to_out[1](projected)


def _product(attn: Attention, features: torch.Tensor, *layers: torch.nn.Linear) -> tuple[torch.Tensor, ...]:
    """Return `features` [B, S, D] times the weights of the layers: for each [B, heads, S, C / heads]."""
    weights = [layer.weight for layer in layers]
    product = functional.linear(features, weights[0] if len(weights) == 1 else torch.cat(weights))
    return product.unflatten(-1, (len(layers), attn.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class _AsHeld:
    """The forward pass of a U-Net in the precision of its weights, whatever autocast says."""

    def __init__(self, forward: Any):
        self._forward = forward

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        *arguments: Any,
        added_cond_kwargs: dict[str, torch.Tensor],
        **named: Any,
    ) -> Any:
        """Return what the U-Net predicts; sizes are embedded in float32, which has every number of pixels."""
        dtype = self._forward.__self__.dtype
        added = added_cond_kwargs | {"text_embeds": added_cond_kwargs["text_embeds"].to(dtype)}
        with torch.autocast(sample.device.type, enabled=False):
            return self._forward(
                sample.to(dtype),
                timestep,
                encoder_hidden_states.to(dtype),
                *arguments,
                added_cond_kwargs=added,
                **named,
            )
