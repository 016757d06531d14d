"""Read and write SDXL as a folder that diffusers' `StableDiffusionXLPipeline.from_pretrained` opens."""

import pickle
import reprlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.config.atomic_files import replacing_folder
from library.config.errors import UserError
from library.sdxl.architecture import (
    BUILDING_ERRORS,
    DEFAULT_LOGIT_SCALE,
    SDXL_BASE,
    Architecture,
    SdxlModel,
    check_facts,
    empty_vae,
    recorded_facts,
)
from library.sdxl.checkpoint_file import ModelDtypes
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
_INDEX = "model_index.json"
_REMEDY = f"Name the folder that holds {_INDEX}, a single .safetensors file, or a model on the hub."

_LARGEST_NUMBER = 1_000_000
"""The largest number that a configuration can hold; a vocabulary has 49,408 words."""

_LOADING_ERRORS = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, *BUILDING_ERRORS)
"""What the libraries raise for a folder that is damaged: they expect configurations that they wrote themselves."""


def prediction_of_folder(name_or_path: str) -> FoundPrediction:
    """Return what the scheduler of a diffusers folder says that the model predicts. Raise as `find_prediction`."""
    return find_prediction(name_or_path, (), {}, _scheduler_config(name_or_path))


def read_diffusers_folder(
    name_or_path: str,
    dtypes: ModelDtypes,
    *,
    with_vae: bool = True,
    prediction: PredictionOptions = AS_THE_MODEL_SAYS,
) -> SdxlModel:
    """Return the model of a diffusers folder (or hub name), on the CPU, in evaluation mode.

    Where `dtypes` leaves the precision open it is float32, since diffusers does not tell the file's own. Without
    `with_vae` the VAE is not read, and stays without weights. Raise `UserError` if the folder is not a whole SDXL
    model, or contradicts `prediction`.
    """
    predicted = prediction.settled(name_or_path, prediction_of_folder(name_or_path))
    _check_configs(name_or_path, with_vae=with_vae)
    unet = _load(UNet2DConditionModel, name_or_path, "unet", dtypes.unet)
    vae = read_diffusers_vae(name_or_path, dtypes.vae) if with_vae else _vae_without_weights(name_or_path)
    text_encoder_l = _load(CLIPTextModel, name_or_path, "text_encoder", dtypes.text_encoder_l)
    text_encoder_g = _load(CLIPTextModelWithProjection, name_or_path, "text_encoder_2", dtypes.text_encoder_g)
    architecture = _architecture(
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


def architecture_of_folder(name_or_path: str) -> Architecture:
    """Return the sizes of the networks of a diffusers folder (or hub name), from its configurations.

    Those of the VAE are SDXL's, since another VAE may be used. Raise `UserError` if they are damaged.
    """
    unet = _checked_config(UNet2DConditionModel, name_or_path, "unet")
    text_encoder_l = _checked_config(CLIPTextModel, name_or_path, "text_encoder")
    text_encoder_g = _checked_config(CLIPTextModelWithProjection, name_or_path, "text_encoder_2")
    return _architecture(unet, SDXL_BASE.vae, text_encoder_l, text_encoder_g)


def _architecture(unet: Any, vae: Any, text_encoder_l: Any, text_encoder_g: Any) -> Architecture:
    return Architecture(
        unet=recorded_facts(unet, SDXL_BASE.unet),
        vae=recorded_facts(vae, SDXL_BASE.vae),
        text_encoder_l=recorded_facts(text_encoder_l, SDXL_BASE.text_encoder_l),
        text_encoder_g=recorded_facts(text_encoder_g, SDXL_BASE.text_encoder_g),
    )


def read_diffusers_vae(name_or_path: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """Return the VAE of a diffusers model folder, or of a folder that is a VAE itself."""
    subfolder = None if (Path(name_or_path) / "config.json").is_file() else "vae"
    _checked_config(AutoencoderKL, name_or_path, subfolder)
    return _load(AutoencoderKL, name_or_path, subfolder, dtype)


def _check_configs(name_or_path: str, *, with_vae: bool) -> None:
    """Raise `UserError` for configurations of what is not SDXL: no weights are read yet."""
    unet = _checked_config(UNet2DConditionModel, name_or_path, "unet")
    channels = unet.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"'{name_or_path}' is not the usual SDXL: its U-Net takes {channels} channels.",
            "Inpainting models cannot be fine-tuned here: use an SDXL base model.",
        )
    if with_vae:
        _checked_config(AutoencoderKL, name_or_path, "vae")
    _checked_config(CLIPTextModel, name_or_path, "text_encoder")
    _checked_config(CLIPTextModelWithProjection, name_or_path, "text_encoder_2")


def _load(network_class: Any, name_or_path: str, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    """Return one network of the folder. (The libraries would fill a missing tensor with random numbers.)"""
    problem = _problem(name_or_path, subfolder)
    usual_dtype = torch.get_default_dtype()
    try:
        network, report = network_class.from_pretrained(
            name_or_path, dtype=dtype or torch.float32, output_loading_info=True, **_where(subfolder)
        )
    except _LOADING_ERRORS as error:
        raise UserError(f"{problem} cannot be loaded ({first_line(error)}).", _REMEDY) from error
    finally:
        torch.set_default_dtype(usual_dtype)  # diffusers changes it, and after an error leaves it changed
    unexpected = report["unexpected_keys"]
    kind = quantisation_of(unexpected) or ("8-bit floats" if any(map(stands_beside_weights, unexpected)) else None)
    if kind is not None:
        raise quantised(f"{name_or_path}/{subfolder or ''}", kind)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{problem} lacks {len(missing)} tensors, such as {missing[0]}.", _REMEDY)
    state = network.state_dict()
    require_finite(f"{name_or_path}/{subfolder or ''}", [name for name in state if not is_finite(state[name])])
    return network


def _checked_config(network_class: Any, name_or_path: str, subfolder: str | None) -> dict[str, Any]:
    """Return the configuration of one network of the folder. Raise `UserError` if no variant of SDXL has it."""
    try:
        config = _config_of(network_class, name_or_path, **_where(subfolder))
        _check_config(config, network_class)
    except _LOADING_ERRORS as error:
        problem = _problem(name_or_path, subfolder)
        raise UserError(f"{problem} cannot be loaded ({first_line(error)}).", _REMEDY) from error
    return dict(config)


def _problem(name_or_path: str, subfolder: str | None) -> str:
    return f"'{name_or_path}' is not a whole SDXL model in diffusers format: {subfolder or 'the VAE'}"


def _where(subfolder: str | None) -> dict[str, str]:
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


def _vae_without_weights(name_or_path: str) -> AutoencoderKL:
    """Return a VAE as the folder configures it, as SDXL base has it if the folder holds none."""
    has_config = _has(name_or_path, "vae/config.json")
    config = _checked_config(AutoencoderKL, name_or_path, "vae") if has_config else {}
    return empty_vae(replace(SDXL_BASE, vae=recorded_facts(config, SDXL_BASE.vae)))


def _scheduler_config(name_or_path: str) -> dict[str, Any]:
    """Return the configuration of the folder's scheduler, empty if there is none."""
    if not _has(name_or_path, "scheduler/scheduler_config.json"):
        return {}
    try:
        config = EulerDiscreteScheduler.load_config(name_or_path, subfolder="scheduler")
    except _LOADING_ERRORS as error:
        raise UserError(f"'{name_or_path}/scheduler' cannot be loaded ({first_line(error)}).", _REMEDY) from error
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
    with replacing_folder(folder, marker=_INDEX) as unfinished:
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
