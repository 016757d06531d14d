"""Two captions to the conditioning of the U-Net: L and G are encoded apart and meet only side by side."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection, PreTrainedModel

from library.config.digests import digest
from library.sdxl.architecture import SDXL_BASE, recorded_facts
from library.sdxl.prompt_weights import weighted_features
from library.sdxl.tensor_file import raw_bytes
from library.sdxl.tokenizers import CaptionTokens


class TextConditioning(NamedTuple):
    """The U-Net's conditioning on the text: `hidden` [B, T, 2048] (L 0-767, G 768-2047) and G's `pooled` [B, 1280].

    T is 75 N + 2: the N chunks one after another between the first start token and the last end.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor


class EncodedText(NamedTuple):
    """The outputs that a batch of caption pairs already has; None where an encoder still has to run.

    Shapes are [B, T, 768], [B, T, 1280] and [B, 1280].
    """

    hidden_l: torch.Tensor | None = None
    hidden_g: torch.Tensor | None = None
    pooled_g: torch.Tensor | None = None


NOT_ENCODED = EncodedText()


class TextWeights(NamedTuple):
    """Factors for the features of a batch of caption pairs: [B, T] for each encoder, [B] for G's pooled vector.

    None is 1 everywhere. A caption that is dropped to zeros has the factor 0 at all positions and in `pooled_g`.
    """

    hidden_l: torch.Tensor | None = None
    hidden_g: torch.Tensor | None = None
    pooled_g: torch.Tensor | None = None


UNWEIGHTED = TextWeights()


def encode_l(text_encoder_l: nn.Module, tokens_l: torch.Tensor) -> torch.Tensor:
    """Return hidden states of L's last block but one, [B, T, 768], for tokens [B, N, 77]."""
    output = text_encoder_l(tokens_l.flatten(0, 1), output_hidden_states=True)
    return _join_chunks(output.hidden_states[-2], num_chunks=tokens_l.shape[1])


def encode_g(text_encoder_g: nn.Module, tokens_g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G's hidden states of the last block but one [B, T, 1280] and pooled vector [B, 1280], of [B, N, 77].

    The pooled vector is OpenCLIP's: the final layer norm at the first end token, times the projection. Of a caption
    of several chunks it is the first chunk's, as in the trainers of kohya's family.
    """
    num_chunks = tokens_g.shape[1]
    output = text_encoder_g(tokens_g.flatten(0, 1), output_hidden_states=True)
    return _join_chunks(output.hidden_states[-2], num_chunks), output.text_embeds[::num_chunks]


def encode_captions(
    text_encoder_l: nn.Module,
    text_encoder_g: nn.Module,
    tokens: CaptionTokens,
    encoded: EncodedText = NOT_ENCODED,
    weights: TextWeights = UNWEIGHTED,
) -> TextConditioning:
    """Return the conditioning for a batch of caption pairs: L's features before G's, and G's pooled vector.

    An encoder works only where `encoded` does not have its outputs. `weights` multiply what the encoders return.
    """
    hidden_l, hidden_g, pooled_g = encoded
    if hidden_l is None:
        hidden_l = encode_l(text_encoder_l, tokens.tokens_l)
    if hidden_g is None or pooled_g is None:
        hidden_g, pooled_g = encode_g(text_encoder_g, tokens.tokens_g)
    if weights.hidden_l is not None:
        hidden_l = weighted_features(hidden_l, weights.hidden_l)
    if weights.hidden_g is not None:
        hidden_g = weighted_features(hidden_g, weights.hidden_g)
    if weights.pooled_g is not None:
        pooled_g = weighted_features(pooled_g, weights.pooled_g)
    return TextConditioning(torch.cat([hidden_l, hidden_g.to(hidden_l.dtype)], dim=-1), pooled_g)


def text_encoder_digest(text_encoder: PreTrainedModel) -> str:
    """Return a digest of all that decides an encoder's output: its weights, their precision, and its configuration.

    Other precisions have other digests, and so has the legacy projection.
    """
    form = recorded_facts(text_encoder.config.to_dict(), SDXL_BASE.text_encoder_g)
    projection = type(getattr(text_encoder, "text_projection", None)).__name__

    def parts() -> Iterator[bytes | memoryview]:
        yield json.dumps([form, projection], sort_keys=True).encode()
        for name, tensor in sorted(text_encoder.state_dict().items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            yield raw_bytes(tensor)

    return digest(parts()).hex()


class LegacyTextProjection(nn.Linear):
    """G's projection as the trainers of kohya's family compute it: by the transposed matrix.

    They copy OpenCLIP's `text_projection` into a linear layer without transposing it. The weight here has the usual
    orientation, in which files are read and written; only the product differs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` [B, C] times the weight; a linear layer multiplies by its transpose."""
        return input @ self.weight


def use_legacy_text_projection(text_encoder_g: CLIPTextModelWithProjection) -> None:
    """Compute G's pooled vector as kohya's trainers do, to continue a model that was trained this way."""
    right = text_encoder_g.text_projection
    with torch.device("meta"):
        legacy = LegacyTextProjection(right.in_features, right.out_features, bias=False)
    legacy.weight = right.weight
    text_encoder_g.text_projection = legacy


def _join_chunks(hidden: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Join [B N, 77, C] to [B, 75 N + 2, C]: the first chunk's start, each chunk's 75 tokens, the last chunk's end."""
    if num_chunks == 1:
        return hidden
    chunks = hidden.unflatten(0, (-1, num_chunks))  # [B, N, 77, C]
    text = chunks[:, :, 1:-1].flatten(1, 2)  # [B, 75 N, C]
    return torch.cat([chunks[:, 0, :1], text, chunks[:, -1, -1:]], dim=1)
