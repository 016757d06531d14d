"""Read and write SDXL as a folder that diffusers' `StableDiffusionXLPipeline.from_pretrained` opens."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, ModelMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.config.errors import UserError
from library.config.output_files import PARTIAL_SUFFIX
from library.sdxl.architecture import SDXL_BASE, Architecture, SdxlModel
from library.sdxl.checkpoint_file import DEFAULT_LOGIT_SCALE, ModelDtypes
from library.sdxl.tensor_file import TensorToWrite, write_safetensors
from library.sdxl.tokenizers import PAD_G, PAD_L, clip_tokenizer

_NETWORKS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def read_diffusers_folder(name_or_path: str, dtypes: ModelDtypes) -> SdxlModel:
    """The model of a diffusers folder (or hub name), on the CPU, in evaluation mode.

    Where `dtypes` leaves the precision open it is float32, since diffusers does not tell the file's own. Raises
    `UserError` where the folder is not a whole SDXL model.
    """
    unet = _load(UNet2DConditionModel, name_or_path, "unet", dtypes.unet)
    vae = read_diffusers_vae(name_or_path, dtypes.vae)
    text_encoder_l = _load(CLIPTextModel, name_or_path, "text_encoder", dtypes.text_encoder_l)
    text_encoder_g = _load(CLIPTextModelWithProjection, name_or_path, "text_encoder_2", dtypes.text_encoder_g)
    architecture = Architecture(
        unet=_facts(unet.config, SDXL_BASE.unet),
        vae=_facts(vae.config, SDXL_BASE.vae),
        text_encoder_l=_facts(text_encoder_l.config.to_dict(), SDXL_BASE.text_encoder_l),
        text_encoder_g=_facts(text_encoder_g.config.to_dict(), SDXL_BASE.text_encoder_g),
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
    """The VAE of a diffusers model folder, or of a folder that is a VAE itself."""
    is_vae_itself = (Path(name_or_path) / "config.json").is_file()
    return _load(AutoencoderKL, name_or_path, None if is_vae_itself else "vae", dtype)


def _load(network_class: Any, name_or_path: str, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    where = {} if subfolder is None else {"subfolder": subfolder}
    try:
        return network_class.from_pretrained(name_or_path, torch_dtype=dtype or torch.float32, **where)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{name_or_path}' is not a whole SDXL model in diffusers format: {subfolder or 'the VAE'} cannot be "
            f"loaded ({str(error).splitlines()[0]}).",
            "Give the folder that holds model_index.json, a single .safetensors file, or a model name of the hub.",
        ) from error


def _facts(config: Any, base: dict[str, Any]) -> dict[str, Any]:
    """The values of `config` that an `Architecture` records; the token ids are CLIP's whatever old configs say."""
    facts = {key: config.get(key, value) for key, value in base.items()}
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    return facts | {key: base[key] for key in ("bos_token_id", "eos_token_id") if key in base}


def write_diffusers_folder(folder: Path, model: SdxlModel, dtype: torch.dtype | None) -> None:
    """Write the model as a diffusers folder, weights streamed as safetensors in `dtype` (None: as in memory).

    The folder is made under another name and then put in the place of an existing one.
    """
    unfinished = folder.with_name(folder.name + PARTIAL_SUFFIX)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    networks: dict[str, Any] = {
        "unet": model.unet,
        "vae": model.vae,
        "text_encoder": model.text_encoder_l,
        "text_encoder_2": model.text_encoder_g,
    }
    for name, network in networks.items():
        _write_config(unfinished / name, network)
        write_safetensors(unfinished / name / _NETWORKS[name], _tensors(network, dtype), {"format": "pt"})
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder_l,
        text_encoder_2=model.text_encoder_g,
        tokenizer=clip_tokenizer(PAD_L),
        tokenizer_2=clip_tokenizer(PAD_G),
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )
    pipeline.tokenizer.save_pretrained(unfinished / "tokenizer")
    pipeline.tokenizer_2.save_pretrained(unfinished / "tokenizer_2")
    pipeline.scheduler.save_pretrained(unfinished / "scheduler")
    pipeline.save_config(unfinished)
    _put_in_place(unfinished, folder)


def _write_config(folder: Path, network: PreTrainedModel | ModelMixin) -> None:
    if isinstance(network, PreTrainedModel):
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)


def _tensors(network: nn.Module, dtype: torch.dtype | None) -> list[TensorToWrite]:
    """The network's tensors under the names that hub folders use, which every release of the libraries reads."""
    is_text_encoder = isinstance(network, PreTrainedModel)
    tensors = []
    for name, tensor in network.state_dict().items():
        in_tower = is_text_encoder and not name.startswith(("text_model.", "text_projection."))
        hub_name = f"text_model.{name}" if in_tower else name
        tensors.append(TensorToWrite(hub_name, tuple(tensor.shape), dtype or tensor.dtype, partial(_itself, tensor)))
    return tensors


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _put_in_place(unfinished: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
