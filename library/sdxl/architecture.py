"""The facts of Stable Diffusion XL: the configurations of its four networks and the record that holds them."""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from library.sdxl.prediction import SDXL_PREDICTION, Prediction
from library.sdxl.sizes import LATENT_CHANNELS

LATENT_SCALE = 0.13025
"""Factor of the VAE's latents on their way to the U-Net."""

ARCHITECTURE_KEY = "sdxl_architecture"
"""Metadata key of a single file whose networks are not of the usual size (the tiny SDXL of demo and tests)."""


@dataclass(frozen=True)
class Architecture:
    """The configurations of the four networks, in the spelling of diffusers (U-Net, VAE) and transformers (L, G)."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder_l: dict[str, Any]
    text_encoder_g: dict[str, Any]

    def to_json(self) -> str:
        """Return the configurations as one line of JSON, for the metadata of a single file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Return the architecture that `to_json` wrote. Raise `ValueError` for any other text."""
        try:
            configs = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(configs, dict) or configs.keys() != names:
            raise ValueError(f"not the keys {', '.join(sorted(names))}")
        for name, config in configs.items():
            base = getattr(SDXL_BASE, name)
            if not isinstance(config, dict) or config.keys() != base.keys():
                raise ValueError(f"'{name}' does not have the keys {', '.join(base)}")
            check_facts(config, base)
        return cls(**configs)


def recorded_facts(config: Any, base: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a network's `config` that an `Architecture` records: the keys of `base`, with its defaults.

    The token ids are CLIP's whatever the config says: those of old hub models are wrong.
    """
    facts = {key: config.get(key, value) for key, value in base.items()}
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    return facts | {key: base[key] for key in ("bos_token_id", "eos_token_id") if key in base}


_LARGEST = 4  # times what SDXL base has; larger networks do not exist
_LARGEST_FRACTION = 100.0
_ACTIVATIONS = frozenset({"gelu", "quick_gelu"})

BUILDING_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
    StrictDataclassError,  # of transformers' configurations
)
"""What the libraries raise for a configuration with which no network can be built."""


def check_facts(facts: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the recorded facts of a network are such as a variant of SDXL can have."""
    for key, usual in base.items():
        if not _is_possible(facts[key], usual):
            raise ValueError(f"'{key}' is {reprlib.repr(facts[key])} where SDXL has {usual!r}")


def _is_possible(value: Any, usual: Any) -> bool:
    match usual:
        case bool():
            return isinstance(value, bool)
        case int():
            return type(value) is int and 1 <= value <= _LARGEST * usual
        case float():
            return type(value) in (int, float) and 0 < value < _LARGEST_FRACTION
        case list():
            is_as_long = isinstance(value, list) and len(value) == len(usual)
            return is_as_long and all(_is_possible(each, one) for each, one in zip(value, usual, strict=True))
        case _:
            return value == usual or (isinstance(value, str) and {value, usual} <= _ACTIVATIONS)


def _text_config(width: int, num_layers: int, num_heads: int, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def make_architecture(
    *,
    unet_channels: tuple[int, int, int],
    unet_heads: tuple[int, int, int],
    vae_channels: tuple[int, int, int, int],
    width_l: int,
    heads_l: int,
    width_g: int,
    heads_g: int,
    norm_num_groups: int = 32,
) -> Architecture:
    """Return SDXL's skeleton (same names, same depths: 12 and 32 text blocks, 1680 U-Net tensors) in other widths.

    Two neighbouring U-Net levels of the same width need no projection between them: that is two tensors fewer.
    """
    size_conditioning_width = 6 * 256
    return Architecture(
        unet={
            "sample_size": 128,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": list(unet_channels),
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": list(unet_heads),
            "cross_attention_dim": width_l + width_g,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": width_g + size_conditioning_width,
            "norm_num_groups": norm_num_groups,
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": LATENT_CHANNELS,
            "block_out_channels": list(vae_channels),
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "norm_num_groups": norm_num_groups,
            "sample_size": 1024,
            "scaling_factor": LATENT_SCALE,
            "force_upcast": True,
        },
        text_encoder_l=_text_config(width_l, 12, heads_l, "quick_gelu"),
        text_encoder_g=_text_config(width_g, 32, heads_g, "gelu"),
    )


SDXL_BASE = make_architecture(
    unet_channels=(320, 640, 1280),
    unet_heads=(5, 10, 20),
    vae_channels=(128, 256, 512, 512),
    width_l=768,
    heads_l=12,
    width_g=1280,
    heads_g=20,
)


DEFAULT_LOGIT_SCALE = math.log(100.0)
"""OpenCLIP's upper bound for the temperature, where bigG's training ended; for files that do not hold it."""


@dataclass
class SdxlModel:
    """The networks of an SDXL checkpoint, their configurations, and the one other tensor of its file."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder_l: CLIPTextModel
    text_encoder_g: CLIPTextModelWithProjection
    architecture: Architecture
    logit_scale: torch.Tensor
    """OpenCLIP's temperature: unused in diffusion, kept so that a saved file has every tensor of the one loaded."""
    prediction: Prediction = SDXL_PREDICTION

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """U-Net, VAE, encoder L, encoder G."""
        return self.unet, self.vae, self.text_encoder_l, self.text_encoder_g


@contextmanager
def _without_weights() -> Iterator[None]:
    """Build networks on the meta device, without drawing the initial weights that nothing would hold."""
    with init_empty_weights(), no_init_weights():
        yield


def empty_unet(architecture: Architecture) -> UNet2DConditionModel:
    """Return a U-Net without weights (meta tensors), ready for `load_state_dict(assign=True)`."""
    with _without_weights():
        return UNet2DConditionModel.from_config(architecture.unet)


def empty_vae(architecture: Architecture) -> AutoencoderKL:
    """Return a VAE without weights (meta tensors)."""
    with _without_weights():
        return AutoencoderKL.from_config(architecture.vae)


def empty_text_encoder_l(architecture: Architecture) -> CLIPTextModel:
    """Return the L encoder without weights (meta tensors)."""
    with _without_weights():
        return CLIPTextModel(CLIPTextConfig(**architecture.text_encoder_l))


def empty_text_encoder_g(architecture: Architecture) -> CLIPTextModelWithProjection:
    """Return the G encoder without weights (meta tensors)."""
    with _without_weights():
        return CLIPTextModelWithProjection(CLIPTextConfig(**architecture.text_encoder_g))


def empty_model(architecture: Architecture) -> SdxlModel:
    """Return a whole model without weights (meta tensors)."""
    return SdxlModel(
        unet=empty_unet(architecture),
        vae=empty_vae(architecture),
        text_encoder_l=empty_text_encoder_l(architecture),
        text_encoder_g=empty_text_encoder_g(architecture),
        architecture=architecture,
        logit_scale=torch.tensor(DEFAULT_LOGIT_SCALE),
    )
