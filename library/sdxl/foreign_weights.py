"""Weights as other programs store them: in other names, in 8-bit floats, quantised, or damaged."""

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import torch

from library.config.errors import UserError, listed
from library.sdxl.tensor_file import TensorReader
from library.sdxl.weight_names import PREFIX_L, TEXT_PROJECTION

log = logging.getLogger(__name__)

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""The types of numbers that weights can be read from."""
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})

_LINEAR_PROJECTION = f"{TEXT_PROJECTION}.weight"
"""G's projection as a linear layer holds it: the transpose of OpenCLIP's."""

_OTHER_NAMES = (
    # diffusers before release 0.17
    (re.compile(r"(mid_block\.attentions\.0\.)query\."), r"\1to_q."),
    (re.compile(r"(mid_block\.attentions\.0\.)key\."), r"\1to_k."),
    (re.compile(r"(mid_block\.attentions\.0\.)value\."), r"\1to_v."),
    (re.compile(r"(mid_block\.attentions\.0\.)proj_attn\."), r"\1to_out.0."),
    # converters that left diffusers' new names in the original layout
    (re.compile(r"(mid\.attn_1\.)to_([qkv])\."), r"\1\2."),
    (re.compile(r"(mid\.attn_1\.)to_out\.0\."), r"\1proj_out."),
    # transformers' names since release 5
    (re.compile(r"^conditioner\.embedders\.0\.transformer\.(?!text_model\.)"), PREFIX_L),
    (re.compile(rf"^{re.escape(_LINEAR_PROJECTION)}$"), TEXT_PROJECTION),
)

_SCALES = (".scale_weight", ".weight_scale")
_BESIDE_WEIGHTS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_LONGEST_NOTE = 10_000  # bytes
_FLOAT8_MARKER = "scaled_fp8"
_FLOAT8_FORMATS = frozenset({"float8_e4m3fn", "float8_e5m2"})
_QUANTISED = (
    (re.compile(r"\.quant_state\.bitsandbytes__(\w+)$"), r"bitsandbytes \1"),
    (re.compile(r"\.SCB$"), "bitsandbytes int8"),
    (re.compile(r"\.(?:absmax|quant_map)$"), "bitsandbytes 4 bits"),
    (re.compile(r"\.qweight$"), "GPTQ, AWQ or SVDQuant"),
)


def in_usual_form(reader: TensorReader) -> TensorReader:
    """Return the tensors of a file under the names of SDXL's original layout, 8-bit floats multiplied by their scales.

    8-bit floats are read as float32. Raise `UserError` for a quantised file.
    """
    kind = quantisation_of(reader.shapes, _comfyui_formats(reader))
    if kind is not None:
        raise quantised(str(reader.path), kind)
    stored_names = [name for name in reader.shapes if not stands_beside_weights(name)]
    stored_names.sort(key=lambda name: _usual_name(name) == name)  # a usual name goes before another for the same
    names = {_usual_name(name): name for name in stored_names}
    shapes = {name: reader.shapes[stored] for name, stored in names.items()}
    if names.get(TEXT_PROJECTION) == _LINEAR_PROJECTION:
        shapes[TEXT_PROJECTION] = shapes[TEXT_PROJECTION][::-1]
    return replace(
        reader,
        shapes=shapes,
        dtypes={name: reader.dtypes[stored] for name, stored in names.items()},
        get=partial(_tensor_of, reader, names),
    )


def warn_of_coarse_weights(reader: TensorReader) -> None:
    """Say how many weights of a file are 8-bit floats, if any."""
    coarse = [name for name, dtype in reader.dtypes.items() if dtype in _FLOAT8]
    if coarse:
        log.warning("'%s': %d weights are 8-bit floats; training starts from coarse values", reader.path, len(coarse))


def quantisation_of(names: Collection[str], formats: Collection[str] = ()) -> str | None:
    """Return how the weights with these tensor names, in these formats of ComfyUI, are quantised; None if not."""
    for pattern, kind in _QUANTISED:
        for name in names:
            match = pattern.search(name)
            if match is not None:
                return match.expand(kind)
    return next((kind for kind in formats if kind not in _FLOAT8_FORMATS), None)


def quantised(source: str, kind: str) -> UserError:
    """Return the error for quantised weights."""
    return UserError(
        f"'{source}' is quantised ({kind}): its weights cannot be trained.",
        "Use the model in float16, bfloat16 or float32.",
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite, by their extremes: an order of magnitude faster than one by one."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def require_finite(source: str, not_finite: list[str]) -> None:
    """Raise `UserError` that names these tensors, if any."""
    if not_finite:
        raise UserError(
            f"'{source}': {len(not_finite)} tensors hold NaN or Inf: {listed(not_finite)}.",
            "The file is damaged, or its numbers are too large for the precision that they are loaded in.",
        )


def _usual_name(name: str) -> str:
    for pattern, usual in _OTHER_NAMES:
        name = pattern.sub(usual, name)
    return name


def stands_beside_weights(name: str) -> bool:
    """Return whether a tensor belongs to weights in 8 bits: a scale, a format or a marker."""
    return name.endswith(_BESIDE_WEIGHTS) or name.rpartition(".")[2] == _FLOAT8_MARKER


def _tensor_of(reader: TensorReader, names: Mapping[str, str], name: str) -> torch.Tensor:
    stored = names[name]
    tensor = reader.get(stored)
    if reader.dtypes[stored] in _FLOAT8:
        tensor = tensor.float() * _scale_of(reader, stored, tensor)
    return tensor.T if stored == _LINEAR_PROJECTION else tensor


def _scale_of(reader: TensorReader, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the scale of a weight: one number, or one for each output of the layer."""
    layer = name.removesuffix(".weight")
    scales = [layer + suffix for suffix in _SCALES if layer + suffix in reader.shapes]
    if not scales:
        return torch.tensor(1.0)
    scale = reader.get(scales[0]).float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != weight.shape[0] or weight.ndim == 0:
        raise quantised(str(reader.path), f"blocks of 8-bit floats, {listed(scales)}")
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _comfyui_formats(reader: TensorReader) -> list[str]:
    """Return the formats that ComfyUI notes beside quantised layers, in a tensor of JSON or in the header."""
    notes = [name for name in reader.shapes if name.endswith(".comfy_quant")]
    header = reader.metadata.get("_quantization_metadata")
    try:
        layers = [json.loads(bytes(reader.get(name)[:_LONGEST_NOTE].tolist())) for name in notes]
        layers += json.loads(header)["layers"].values() if header is not None else ()
        return [str(layer["format"]) for layer in layers]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ["unknown to this program"]


# -- other models -----------------------------------------------------------------------------------------------------

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


def what_it_is(reader: TensorReader) -> str:
    """Return what a file with too few tensors of SDXL is, as the end of a sentence."""
    for prefix, family in _OTHER_MODELS:
        if any(name.startswith(prefix) for name in reader.shapes):
            return f"is not an SDXL checkpoint (it looks like {family})"
    return "is not a whole SDXL checkpoint"
