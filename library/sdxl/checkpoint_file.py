"""Read and write SDXL as one file, in the layout that ComfyUI, WebUIs and diffusers open."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from library.config.errors import UserError, listed
from library.sdxl.architecture import (
    ARCHITECTURE_KEY,
    SDXL_BASE,
    Architecture,
    SdxlModel,
    empty_model,
    empty_vae,
)
from library.sdxl.tensor_file import TensorReader, TensorToWrite, open_tensors, write_pickle, write_safetensors
from library.sdxl.weight_names import (
    LOGIT_SCALE,
    PREFIX_VAE,
    StoredTensor,
    text_encoder_g_table,
    text_encoder_l_table,
    unet_table,
    vae_table,
)

log = logging.getLogger(__name__)

_OTHER_MODELS = (
    ("lora_unet_", "a LoRA, not a whole model"),
    ("lora_te", "a LoRA, not a whole model"),
    ("cond_stage_model.transformer.", "Stable Diffusion 1.x"),
    ("cond_stage_model.model.", "Stable Diffusion 2.x"),
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("model.diffusion_model.double_blocks.", "Flux"),
)


@dataclass(frozen=True)
class ModelDtypes:
    """The precision in which each part is held in memory; None keeps the file's own."""

    unet: torch.dtype | None = None
    vae: torch.dtype | None = None
    text_encoder_l: torch.dtype | None = None
    text_encoder_g: torch.dtype | None = None


# -- reading ----------------------------------------------------------------------------------------------------------


def read_single_file(path: Path, dtypes: ModelDtypes) -> SdxlModel:
    """Return the model of a single file, on the CPU, in evaluation mode.

    The file is mapped into memory and each tensor copied once, in its final precision. Raise `UserError` for a file
    that is damaged, of another model family, or lacks tensors of SDXL or holds them in other shapes (which ones).
    """
    with open_tensors(path) as reader:
        architecture = _architecture_of(reader, SDXL_BASE)
        model = empty_model(architecture)
        parts = _parts(model, dtypes)
        for network, table, _ in parts:
            _check(reader, network, table)
        for network, table, dtype in parts:
            _fill(reader, network, table, dtype)
        if LOGIT_SCALE in reader.shapes:
            model.logit_scale = reader.get(LOGIT_SCALE).clone()
        _report_unused(reader, {stored.name for _, table, _ in parts for stored in table})
    return model


def read_vae(path: Path, dtype: torch.dtype | None, architecture: Architecture = SDXL_BASE) -> AutoencoderKL:
    """The VAE alone, out of an SDXL single file or a VAE file (original or diffusers names); nothing else is read.

    `architecture` is assumed for a file that does not record one. Raises as `read_single_file`.
    """
    with open_tensors(path) as reader:
        vae = empty_vae(_architecture_of(reader, architecture))
        table = _vae_table_of(reader, vae)
        _check(reader, vae, table)
        _fill(reader, vae, table, dtype)
    return vae


def _architecture_of(reader: TensorReader, otherwise: Architecture) -> Architecture:
    """Return the architecture that the file's metadata notes, `otherwise` where there is no note."""
    if ARCHITECTURE_KEY not in reader.metadata:
        return otherwise
    try:
        return Architecture.from_json(reader.metadata[ARCHITECTURE_KEY])
    except ValueError as error:
        raise UserError(
            f"'{reader.path}': the metadata key '{ARCHITECTURE_KEY}' does not hold four configurations ({error}).",
            "Write the file again with the program that made it.",
        ) from error


def _vae_table_of(reader: TensorReader, vae: nn.Module) -> list[StoredTensor]:
    """Return the table that fits the names in use: of a whole checkpoint, of a VAE file, or of diffusers."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in reader.shapes:
        return [StoredTensor(name, (name,)) for name in vae.state_dict()]
    table = vae_table(vae)
    if "encoder.conv_in.weight" in reader.shapes:
        return [StoredTensor(entry.name.removeprefix(PREFIX_VAE), entry.parameters, entry.form) for entry in table]
    return table


def _parts(model: SdxlModel, dtypes: ModelDtypes) -> list[tuple[nn.Module, list[StoredTensor], torch.dtype | None]]:
    return [
        (model.unet, unet_table(model.unet), dtypes.unet),
        (model.vae, vae_table(model.vae), dtypes.vae),
        (model.text_encoder_l, text_encoder_l_table(model.text_encoder_l), dtypes.text_encoder_l),
        (model.text_encoder_g, text_encoder_g_table(model.text_encoder_g), dtypes.text_encoder_g),
    ]


def _check(reader: TensorReader, network: nn.Module, table: list[StoredTensor]) -> None:
    """Raise `UserError` unless the file has every tensor of `table` in the shape that `network` expects."""
    parameters = network.state_dict()
    missing = [stored.name for stored in table if stored.name not in reader.shapes]
    if missing:
        raise UserError(
            f"'{reader.path}' {_what_it_is(reader)}: {len(missing)} tensors are missing, such as "
            f"{listed(missing, limit=5)}.",
            "Give an SDXL checkpoint (the base model or one fine-tuned from it).",
        )
    misshapen = []
    for stored in table:
        expected = stored.from_parameters([parameters[name] for name in stored.parameters]).shape
        if reader.shapes[stored.name] != tuple(expected):
            misshapen.append(f"{stored.name} {list(reader.shapes[stored.name])} for {list(expected)}")
    if misshapen:
        raise UserError(
            f"'{reader.path}' is not the usual SDXL: {len(misshapen)} tensors differ in shape: "
            f"{listed(misshapen, limit=5)}.",
            "Inpainting, refiner and pruned models cannot be fine-tuned here: give an SDXL base checkpoint.",
        )


def _what_it_is(reader: TensorReader) -> str:
    for prefix, family in _OTHER_MODELS:
        if any(name.startswith(prefix) for name in reader.shapes):
            return f"is not an SDXL checkpoint (it looks like {family})"
    return "is not a whole SDXL checkpoint"


def _fill(reader: TensorReader, network: nn.Module, table: list[StoredTensor], dtype: torch.dtype | None) -> None:
    weights = {}
    for stored in table:
        parts = stored.to_parameters(reader.get(stored.name))
        for name, part in zip(stored.parameters, parts, strict=True):
            # A copy even where nothing is converted: weights that stay mapped would lock the file on Windows.
            weights[name] = part.to(dtype or part.dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(weights, assign=True)
    network.eval()


def _report_unused(reader: TensorReader, used: set[str]) -> None:
    known = {*used, LOGIT_SCALE}
    unused = [name for name in reader.shapes if name not in known and not name.endswith(".position_ids")]
    if unused:
        log.warning(
            "'%s': %d tensors are not part of SDXL and are left out: %s",
            reader.path,
            len(unused),
            listed(unused, limit=5),
        )


# -- writing ----------------------------------------------------------------------------------------------------------


def tensors_to_write(model: SdxlModel, dtype: torch.dtype | None) -> Iterator[TensorToWrite]:
    """Yield every tensor of the single file in its order, in `dtype` (None: as held in memory), made one at a time."""
    for network, table, _ in _parts(model, ModelDtypes()):
        parameters = network.state_dict()
        for stored in table:
            tensors = [parameters[name] for name in stored.parameters]
            shape = stored.from_parameters([tensor.to("meta") for tensor in tensors]).shape
            make = _Joined(stored, tensors)
            yield TensorToWrite(stored.name, tuple(shape), dtype or tensors[0].dtype, make)
    yield TensorToWrite(
        LOGIT_SCALE, tuple(model.logit_scale.shape), dtype or model.logit_scale.dtype, lambda: model.logit_scale
    )


@dataclass(frozen=True)
class _Joined:
    stored: StoredTensor
    tensors: list[torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.stored.from_parameters(self.tensors)


def write_single_file(path: Path, model: SdxlModel, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
    """Write the model as one `.safetensors` (streamed: memory for one tensor) or, by its name, one `.ckpt` file.

    `dtype` is the precision in the file, None keeps what is in memory. `metadata` goes into the header (of a `.ckpt`:
    beside the tensors), with the architecture where it is not SDXL base. Raise `UserError` where `path` cannot be
    written.
    """
    if model.architecture != SDXL_BASE:
        metadata = {**metadata, ARCHITECTURE_KEY: model.architecture.to_json()}
    write = write_pickle if path.suffix.lower() == ".ckpt" else write_safetensors
    write(path, tensors_to_write(model, dtype), metadata)
