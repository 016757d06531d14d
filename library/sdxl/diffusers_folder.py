"""Read and write SDXL as a folder that diffusers' `StableDiffusionXLPipeline.from_pretrained` opens."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, ModelMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.config.atomic_files import replacing_folder
from library.config.errors import UserError
from library.sdxl.architecture import DEFAULT_LOGIT_SCALE, SDXL_BASE, Architecture, SdxlModel, recorded_facts
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.prediction import SDXL_PREDICTION
from library.sdxl.sizes import LATENT_CHANNELS
from library.sdxl.tensor_file import TensorToWrite, write_safetensors
from library.sdxl.tokenizers import PAD_G, PAD_L, save_tokenizer

_NETWORKS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
_INDEX = "model_index.json"
_REMEDY = f"Give the folder that holds {_INDEX}, a single .safetensors file, or a model name of the hub."


def read_diffusers_folder(name_or_path: str, dtypes: ModelDtypes) -> SdxlModel:
    """Return the model of a diffusers folder (or hub name), on the CPU, in evaluation mode.

    Where `dtypes` leaves the precision open it is float32, since diffusers does not tell the file's own. Raises
    `UserError` where the folder is not a whole SDXL model.
    """
    unet = _load(UNet2DConditionModel, name_or_path, "unet", dtypes.unet)
    if unet.config.in_channels != LATENT_CHANNELS:
        raise UserError(
            f"'{name_or_path}' is not the usual SDXL: its U-Net takes {unet.config.in_channels} channels.",
            "Inpainting models cannot be fine-tuned here: give an SDXL base model.",
        )
    vae = read_diffusers_vae(name_or_path, dtypes.vae)
    text_encoder_l = _load(CLIPTextModel, name_or_path, "text_encoder", dtypes.text_encoder_l)
    text_encoder_g = _load(CLIPTextModelWithProjection, name_or_path, "text_encoder_2", dtypes.text_encoder_g)
    architecture = Architecture(
        unet=recorded_facts(unet.config, SDXL_BASE.unet),
        vae=recorded_facts(vae.config, SDXL_BASE.vae),
        text_encoder_l=recorded_facts(text_encoder_l.config.to_dict(), SDXL_BASE.text_encoder_l),
        text_encoder_g=recorded_facts(text_encoder_g.config.to_dict(), SDXL_BASE.text_encoder_g),
    )
    return SdxlModel(
        unet.eval(),
        vae.eval(),
        text_encoder_l.eval(),
        text_encoder_g.eval(),
        architecture,
        torch.tensor(DEFAULT_LOGIT_SCALE),
    )


def read_diffusers_vae(name_or_path: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """Return the VAE of a diffusers model folder, or of a folder that is a VAE itself."""
    is_vae_itself = (Path(name_or_path) / "config.json").is_file()
    return _load(AutoencoderKL, name_or_path, None if is_vae_itself else "vae", dtype)


def _load(network_class: Any, name_or_path: str, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    """One network of the folder. (The libraries would fill a tensor that is missing with random numbers.)"""
    where = {} if subfolder is None else {"subfolder": subfolder}
    problem = f"'{name_or_path}' is not a whole SDXL model in diffusers format: {subfolder or 'the VAE'}"
    try:
        network, report = network_class.from_pretrained(
            name_or_path, dtype=dtype or torch.float32, output_loading_info=True, **where
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{problem} cannot be loaded ({reason}).", _REMEDY) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{problem} lacks {len(missing)} tensors, such as {missing[0]}.", _REMEDY)
    return network


def write_diffusers_folder(folder: Path, model: SdxlModel, dtype: torch.dtype | None) -> None:
    """Write the model as a diffusers folder, weights streamed as safetensors in `dtype` (None: as in memory).

    The folder is made under another name and then put in the place of an existing model. Raise `UserError` where that
    cannot be done, or where the existing folder holds anything else.
    """
    with replacing_folder(folder, marker=_INDEX) as unfinished:
        for name, network in _networks(model).items():
            write_safetensors(unfinished / name / _NETWORKS[name], _tensors(network, dtype), {"format": "pt"})
        write_diffusers_configs(unfinished, model)


def write_diffusers_configs(folder: Path, model: SdxlModel) -> None:
    """All of the folder but the weights: configurations, tokenizers, scheduler, and the index that names all classes.

    It is also what `StableDiffusionXLPipeline.from_single_file(..., config=folder)` needs without a network, and it
    can be written of a model on the meta device.
    """
    for name, network in _networks(model).items():
        _write_config(folder / name, network)
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder_l,
        text_encoder_2=model.text_encoder_g,
        tokenizer=save_tokenizer(folder / "tokenizer", PAD_L),
        tokenizer_2=save_tokenizer(folder / "tokenizer_2", PAD_G),
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(
            **SDXL_PREDICTION.scheduler_settings(),
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


def _networks(model: SdxlModel) -> dict[str, Any]:
    return {
        "unet": model.unet,
        "vae": model.vae,
        "text_encoder": model.text_encoder_l,
        "text_encoder_2": model.text_encoder_g,
    }


def _write_config(folder: Path, network: PreTrainedModel | ModelMixin) -> None:
    if isinstance(network, PreTrainedModel):
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)


def _tensors(network: nn.Module, dtype: torch.dtype | None) -> list[TensorToWrite]:
    """Return the network's tensors under the names that hub folders use, which every release of the libraries reads."""
    is_text_encoder = isinstance(network, PreTrainedModel)
    tensors = []
    for name, tensor in network.state_dict().items():
        in_tower = is_text_encoder and not name.startswith(("text_model.", "text_projection."))
        hub_name = f"text_model.{name}" if in_tower else name
        tensors.append(TensorToWrite(hub_name, tuple(tensor.shape), dtype or tensor.dtype, partial(_itself, tensor)))
    return tensors


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
