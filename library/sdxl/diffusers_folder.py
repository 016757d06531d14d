"""Read and write SDXL as a folder that diffusers' `StableDiffusionXLPipeline.from_pretrained` opens."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.config.atomic_files import replacing_folder
from library.config.errors import UserError
from library.sdxl.architecture import (
    DEFAULT_LOGIT_SCALE,
    SDXL_BASE,
    SdxlModel,
    empty_vae,
    recorded_facts,
)
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.folder_configs import (
    INDEX,
    LOADING_ERRORS,
    REMEDY,
    architecture_of_configs,
    checked_config,
    problem_of,
    where,
)
from library.sdxl.folder_weights import read_into
from library.sdxl.foreign_weights import is_finite, quantisation_of, quantised, require_finite, stands_beside_weights
from library.sdxl.prediction import FLOW, Prediction
from library.sdxl.prediction_claims import FoundPrediction, find_prediction
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS, PredictionOptions
from library.sdxl.sizes import LATENT_CHANNELS
from library.sdxl.tensor_file import Replacing, TensorToWrite, first_line, write_safetensors, written
from library.sdxl.tokenizers import PAD_G, PAD_L, save_tokenizer

_NETWORKS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def prediction_of_folder(name_or_path: str) -> FoundPrediction:
    """Return what the scheduler of a diffusers folder says that the model predicts. Raise as `find_prediction`."""
    return find_prediction(name_or_path, (), {}, _scheduler_config(name_or_path))


def read_diffusers_folder(
    name_or_path: str,
    dtypes: ModelDtypes,
    *,
    with_vae: bool = True,
    with_unet: bool = True,
    prediction: PredictionOptions = AS_THE_MODEL_SAYS,
) -> SdxlModel:
    """Return the model of a diffusers folder (or hub name), on the CPU, in evaluation mode.

    Where `dtypes` leaves the precision open it is float32, since diffusers does not tell the file's own. Without
    `with_vae` the VAE is not read, and stays without weights; without `with_unet` the U-Net stays so for
    `read_unet_of_folder_into`. Raise `UserError` if the folder is not a whole SDXL model, or contradicts `prediction`.
    """
    predicted = prediction.settled(name_or_path, prediction_of_folder(name_or_path))
    _check_configs(name_or_path, with_vae=with_vae)
    unet = _load(UNet2DConditionModel, name_or_path, "unet", dtypes.unet) if with_unet else _unet_of(name_or_path)
    vae = read_diffusers_vae(name_or_path, dtypes.vae) if with_vae else _vae_without_weights(name_or_path)
    text_encoder_l = _load(CLIPTextModel, name_or_path, "text_encoder", dtypes.text_encoder_l)
    text_encoder_g = _load(CLIPTextModelWithProjection, name_or_path, "text_encoder_2", dtypes.text_encoder_g)
    architecture = architecture_of_configs(
        unet.config, vae.config, text_encoder_l.config.to_dict(), text_encoder_g.config.to_dict()
    )
    return SdxlModel(
        unet.eval(),
        vae.eval(),
        text_encoder_l.eval(),
        text_encoder_g.eval(),
        architecture,
        torch.tensor(DEFAULT_LOGIT_SCALE),
        predicted,
    )


def read_unet_of_folder_into(
    unet: nn.Module, name_or_path: str, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Read the weights of a U-Net without weights straight to `device`. Raise as `read_diffusers_folder`.

    Those of a model on the hub, or under older names, pass through host memory.
    """
    if read_into(unet, Path(name_or_path) / "unet", _NETWORKS["unet"], dtype or torch.float32, device):
        return
    read = _load(UNet2DConditionModel, name_or_path, "unet", dtype)
    unet.load_state_dict(read.to(device).state_dict(), assign=True)


def _unet_of(name_or_path: str) -> UNet2DConditionModel:
    """Return the U-Net of a folder without weights. Raise `UserError` if no network can be built as it says."""
    config = checked_config(UNet2DConditionModel, name_or_path, "unet")
    try:
        with init_empty_weights():
            return UNet2DConditionModel.from_config(config)
    except LOADING_ERRORS as error:
        problem = problem_of(name_or_path, "unet")
        raise UserError(f"{problem} cannot be loaded ({first_line(error)}).", REMEDY) from error


def read_diffusers_vae(name_or_path: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """Return the VAE of a diffusers model folder, or of a folder that is a VAE itself."""
    subfolder = None if (Path(name_or_path) / "config.json").is_file() else "vae"
    checked_config(AutoencoderKL, name_or_path, subfolder)
    return _load(AutoencoderKL, name_or_path, subfolder, dtype)


def _check_configs(name_or_path: str, *, with_vae: bool) -> None:
    """Raise `UserError` for configurations of what is not SDXL: no weights are read yet."""
    unet = checked_config(UNet2DConditionModel, name_or_path, "unet")
    channels = unet.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"'{name_or_path}' is not the usual SDXL: its U-Net takes {channels} channels.",
            "Inpainting models cannot be fine-tuned here: use an SDXL base model.",
        )
    if with_vae:
        checked_config(AutoencoderKL, name_or_path, "vae")
    checked_config(CLIPTextModel, name_or_path, "text_encoder")
    checked_config(CLIPTextModelWithProjection, name_or_path, "text_encoder_2")


def _load(network_class: Any, name_or_path: str, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    """Return one network of the folder. (The libraries would fill a missing tensor with random numbers.)"""
    problem = problem_of(name_or_path, subfolder)
    usual_dtype = torch.get_default_dtype()
    try:
        network, report = network_class.from_pretrained(
            name_or_path, dtype=dtype or torch.float32, output_loading_info=True, **where(subfolder)
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{problem} cannot be loaded ({first_line(error)}).", REMEDY) from error
    finally:
        torch.set_default_dtype(usual_dtype)  # diffusers changes it, and after an error leaves it changed
    unexpected = report["unexpected_keys"]
    kind = quantisation_of(unexpected) or ("8-bit floats" if any(map(stands_beside_weights, unexpected)) else None)
    if kind is not None:
        raise quantised(f"{name_or_path}/{subfolder or ''}", kind)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{problem} lacks {len(missing)} tensors, such as {missing[0]}.", REMEDY)
    state = network.state_dict()
    require_finite(f"{name_or_path}/{subfolder or ''}", [name for name in state if not is_finite(state[name])])
    return network


def _vae_without_weights(name_or_path: str) -> AutoencoderKL:
    """Return a VAE as the folder configures it, as SDXL base has it if the folder holds none."""
    has_config = _has(name_or_path, "vae/config.json")
    config = checked_config(AutoencoderKL, name_or_path, "vae") if has_config else {}
    return empty_vae(replace(SDXL_BASE, vae=recorded_facts(config, SDXL_BASE.vae)))


def _scheduler_config(name_or_path: str) -> dict[str, Any]:
    """Return the configuration of the folder's scheduler, empty if there is none."""
    if not _has(name_or_path, "scheduler/scheduler_config.json"):
        return {}
    try:
        config = EulerDiscreteScheduler.load_config(name_or_path, subfolder="scheduler")
    except LOADING_ERRORS as error:
        raise UserError(f"'{name_or_path}/scheduler' cannot be loaded ({first_line(error)}).", REMEDY) from error
    return config if isinstance(config, dict) else {}


def _has(name_or_path: str, file: str) -> bool:
    """Return whether the folder has the file; a model on the hub is taken to have every file."""
    return not Path(name_or_path).is_dir() or (Path(name_or_path) / file).is_file()


def write_diffusers_folder(
    folder: Path, model: SdxlModel, dtype: torch.dtype | None, replacing: Replacing | None = None
) -> None:
    """Write the model as a diffusers folder, weights streamed as safetensors in `dtype` (None: as in memory).

    `replacing` names tensors to write in place of those in memory.

    The folder is made under another name and then put in the place of an existing model. Raise `UserError` where that
    cannot be done, or where the existing folder holds anything else.
    """
    with replacing_folder(folder, marker=INDEX) as unfinished:
        for name, network in _networks(model).items():
            write_safetensors(
                unfinished / name / _NETWORKS[name], _tensors(network, dtype, replacing), {"format": "pt"}
            )
        write_diffusers_configs(unfinished, model)


def write_diffusers_configs(folder: Path, model: SdxlModel) -> None:
    """Write all of the folder but the weights: configurations, tokenizers, scheduler, and the index of classes.

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
        scheduler=_scheduler(model.prediction),
    )
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


def _scheduler(prediction: Prediction) -> Any:
    """Return the scheduler of the folder: one that diffusers' SDXL pipeline can draw with."""
    if prediction.kind == FLOW:  # the pipeline cannot draw with schedulers of the FlowMatch family
        return DPMSolverMultistepScheduler(
            num_train_timesteps=prediction.num_timesteps,
            prediction_type=prediction.kind,
            use_flow_sigmas=True,
            flow_shift=prediction.flow_shift,
        )
    if prediction.has_zero_terminal_snr:
        return EulerDiscreteScheduler(
            **prediction.scheduler_settings(), timestep_spacing="trailing", rescale_betas_zero_snr=True
        )
    return EulerDiscreteScheduler(**prediction.scheduler_settings(), timestep_spacing="leading", steps_offset=1)


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


def _tensors(network: nn.Module, dtype: torch.dtype | None, replacing: Replacing | None) -> list[TensorToWrite]:
    """Return the network's tensors under the names that hub folders use, which every release of the libraries reads."""
    is_text_encoder = isinstance(network, PreTrainedModel)
    tensors = []
    for name, tensor in network.state_dict().items():
        in_tower = is_text_encoder and not name.startswith(("text_model.", "text_projection."))
        hub_name = f"text_model.{name}" if in_tower else name
        make = partial(written, replacing, network, name, tensor)
        tensors.append(TensorToWrite(hub_name, tuple(tensor.shape), dtype or tensor.dtype, make))
    return tensors
