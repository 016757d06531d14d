"""The U-Net with fewer launches on a GPU: blocks without what SDXL does not use, and no autocast beside bfloat16.

Names, weights and files of the network stay as they are; weights that are multiplied with the same features are put
side by side in memory, so that they are one matrix without a copy.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def make_lean(unet: UNet2DConditionModel, *, without_autocast: bool) -> None:
    """Let the blocks of `unet` launch less; with `without_autocast` it computes in the precision it is held in.

    Autocast would cast every weight's input and compute norms in float32; in bfloat16 they add up in float32 too, and
    round once. Call it where the weights lie on their device and no optimizer holds them yet: some are
    replaced.
    """
    for module in unet.modules():
        if type(module) is ResnetBlock2D and _is_usual_residual(module):
            module.forward = MethodType(_residual, module)
        if isinstance(module, Attention) and _is_usual_attention(module):
            module.set_processor(LeanAttention())
            _put_side_by_side(*([module.to_k, module.to_v] if module.is_cross_attention else _layers(module)))
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
    is_plain = not any(others) and not attention.residual_connection and attention.rescale_output_factor == 1.0
    return is_plain and all(layer is not None and layer.bias is None for layer in _layers(attention))


def _layers(attention: Attention) -> tuple[nn.Linear, ...]:
    return attention.to_q, attention.to_k, attention.to_v


class LeanAttention:
    """Attention as diffusers computes it, with queries, keys and values in one product, and no division by 1.

    Of cross-attention keys and values are one product. Gradients take the same way back: one product for the weights
    and one for the features.
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
            parts = _products(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            parts = (attn.to_q(hidden_states), *_products(encoder_hidden_states, attn.to_k, attn.to_v))
        # Heads are split and joined by views alone: [B, S, C] is [B, S, heads, C / heads] in memory.
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        projected: torch.Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return attn.to_out[1](projected)


def _put_side_by_side(*layers: nn.Linear) -> None:
    """Let the weights of the layers lie one behind the other in memory, each as a parameter, with its name."""
    joined = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, joined.split([layer.out_features for layer in layers]), strict=True):
        # By `data`, since parts of one tensor would count their changes together: autograd would take one for another.
        layer.weight = nn.Parameter(part.data, requires_grad=layer.weight.requires_grad)


def _products(features: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Return `features` [B, S, D] times the weights of each layer."""
    weights = [layer.weight for layer in layers]
    if torch.is_autocast_enabled(features.device.type) or torch.compiler.is_compiling():
        product = functional.linear(features, torch.cat(weights))
        return product.split([layer.out_features for layer in layers], dim=-1)
    found: tuple[torch.Tensor, ...] = _SideBySide.apply(features, *weights)
    return found


class _SideBySide(torch.autograd.Function):
    """Products of the same features with several weights, as one."""

    @staticmethod
    def forward(context: Any, features: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return `features` [B, S, D] times each of the `weights` [C, D]."""
        context.save_for_backward(features, *weights)
        return functional.linear(features, _joined(weights)).split([len(weight) for weight in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the features and of each weight."""
        features, *weights = context.saved_tensors
        joined = torch.cat(gradients, dim=-1).flatten(0, -2)
        needs_features, *needs_weights = context.needs_input_grad
        of_features = (joined @ _joined(weights)).view(features.shape) if needs_features else None
        if not any(needs_weights):
            return (of_features, *(None for _ in weights))
        of_weights = (joined.t() @ features.flatten(0, -2)).split([len(weight) for weight in weights])
        return (
            of_features,
            *(each if needed else None for each, needed in zip(of_weights, needs_weights, strict=True)),
        )


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weights [C, D] as one tensor: where they lie, if it is side by side, else as a copy."""
    first = weights[0]
    storage, at = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        if weight.untyped_storage()._cdata != storage or weight.storage_offset() != at or not weight.is_contiguous():
            return torch.cat(list(weights))
        at += weight.numel()
    return first.as_strided((sum(len(weight) for weight in weights), first.shape[1]), first.stride())


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
