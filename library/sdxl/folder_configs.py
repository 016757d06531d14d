"""The configurations in a diffusers folder: read, checked, and the sizes of networks that they describe."""

import pickle
import reprlib
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.config.errors import UserError
from library.sdxl.architecture import BUILDING_ERRORS, SDXL_BASE, Architecture, check_facts, recorded_facts
from library.sdxl.tensor_file import first_line

INDEX = "model_index.json"
REMEDY = f"Name the folder that holds {INDEX}, a single .safetensors file, or a model on the hub."

_LARGEST_NUMBER = 1_000_000
"""The largest number that a configuration can hold; a vocabulary has 49,408 words."""

LOADING_ERRORS = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, *BUILDING_ERRORS)
"""What the libraries raise for a folder that is damaged: they expect configurations that they wrote themselves."""


def architecture_of_folder(name_or_path: str) -> Architecture:
    """Return the sizes of the networks of a diffusers folder (or hub name), from its configurations.

    Those of the VAE are SDXL's, since another VAE may be used. Raise `UserError` if they are damaged.
    """
    unet = checked_config(UNet2DConditionModel, name_or_path, "unet")
    text_encoder_l = checked_config(CLIPTextModel, name_or_path, "text_encoder")
    text_encoder_g = checked_config(CLIPTextModelWithProjection, name_or_path, "text_encoder_2")
    return architecture_of_configs(unet, SDXL_BASE.vae, text_encoder_l, text_encoder_g)


def architecture_of_configs(unet: Any, vae: Any, text_encoder_l: Any, text_encoder_g: Any) -> Architecture:
    return Architecture(
        unet=recorded_facts(unet, SDXL_BASE.unet),
        vae=recorded_facts(vae, SDXL_BASE.vae),
        text_encoder_l=recorded_facts(text_encoder_l, SDXL_BASE.text_encoder_l),
        text_encoder_g=recorded_facts(text_encoder_g, SDXL_BASE.text_encoder_g),
    )


def checked_config(network_class: Any, name_or_path: str, subfolder: str | None) -> dict[str, Any]:
    """Return the configuration of one network of the folder. Raise `UserError` if no variant of SDXL has it."""
    try:
        config = _config_of(network_class, name_or_path, **where(subfolder))
        _check_config(config, network_class)
    except LOADING_ERRORS as error:
        problem = problem_of(name_or_path, subfolder)
        raise UserError(f"{problem} cannot be loaded ({first_line(error)}).", REMEDY) from error
    return dict(config)


def problem_of(name_or_path: str, subfolder: str | None) -> str:
    return f"'{name_or_path}' is not a whole SDXL model in diffusers format: {subfolder or 'the VAE'}"


def where(subfolder: str | None) -> dict[str, str]:
    return {} if subfolder is None else {"subfolder": subfolder}


def _config_of(network_class: Any, name_or_path: str, **where: str) -> Any:
    if issubclass(network_class, PreTrainedModel):
        return network_class.config_class.get_config_dict(name_or_path, **where)[0]
    return network_class.load_config(name_or_path, **where)


def _check_config(config: Any, network_class: Any) -> None:
    """Raise `ValueError` for a configuration that no variant of SDXL has, before a network is built from it."""
    if not isinstance(config, dict):
        raise ValueError("its configuration is not a table")
    if config.get("quantization_config"):
        raise ValueError("it is quantised; use the model in float16, bfloat16 or float32")
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
            raise ValueError(f"its configuration holds the number {reprlib.repr(value)}")
    base = _BASES[network_class]
    check_facts(recorded_facts(config, base), base)


_BASES = {
    UNet2DConditionModel: SDXL_BASE.unet,
    AutoencoderKL: SDXL_BASE.vae,
    CLIPTextModel: SDXL_BASE.text_encoder_l,
    CLIPTextModelWithProjection: SDXL_BASE.text_encoder_g,
}
