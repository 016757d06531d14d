"""Read and write SDXL as one file, in the layout that ComfyUI, WebUIs and diffusers open."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from library.config.errors import listed
from library.sdxl.architecture import (
    ARCHITECTURE_KEY,
    SDXL_BASE,
    Architecture,
    SdxlModel,
    empty_model,
    empty_vae,
)
from library.sdxl.expected_tensors import expected_shapes, require_tensors
from library.sdxl.file_architecture import without_weights
from library.sdxl.foreign_weights import (
    in_usual_form,
    is_finite,
    require_finite,
    warn_of_coarse_weights,
)
from library.sdxl.model_spec import HASH_KEY
from library.sdxl.prediction import SDXL_PREDICTION, ZERO_TERMINAL_SNR_MARKER
from library.sdxl.prediction_claims import MARKERS, FoundPrediction, find_prediction
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS, PredictionOptions
from library.sdxl.tensor_file import (
    Replacing,
    TensorReader,
    TensorToWrite,
    open_tensors,
    write_pickle,
    write_safetensors,
    written,
)
from library.sdxl.weight_names import (
    LOGIT_SCALE,
    PREFIX_VAE,
    TEXT_PROJECTION,
    Form,
    StoredTensor,
    text_encoder_g_table,
    text_encoder_l_table,
    unet_table,
    vae_table,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelDtypes:
    """The precision in which each part is held in memory; None keeps the file's own."""

    unet: torch.dtype | None = None
    vae: torch.dtype | None = None
    text_encoder_l: torch.dtype | None = None
    text_encoder_g: torch.dtype | None = None


# -- reading ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
_ONETRAINER_PREFIX = "ot_"  # of its keys in the header


def prediction_of_file(path: Path) -> FoundPrediction:
    """Return what the model of a single file says that it predicts; no weights are read. Raise as `find_prediction`."""
    with open_tensors(path) as file:
        return find_prediction(str(path), file.shapes, file.metadata, {})


def read_single_file(
    path: Path,
    dtypes: ModelDtypes,
    *,
    with_vae: bool = True,
    with_unet: bool = True,
    transposed_text_projection: bool = False,
    prediction: PredictionOptions = AS_THE_MODEL_SAYS,
) -> SdxlModel:
    """Return the model of a single file, on the CPU, in evaluation mode.

    The file is mapped into memory and each tensor copied once, in its final precision. Without `with_vae` the VAE is
    not read, and stays without weights; without `with_unet` the U-Net stays so, for `read_unet_into`.
    `transposed_text_projection` says that the file stores G's projection transposed. Raise `UserError` for a file that
    is damaged, of another model family, quantised, contradicts `prediction`, lacks tensors of SDXL, or holds them in
    other shapes or with NaN or Inf.
    """
    with open_tensors(path) as file:
        predicted = prediction.settled(str(path), find_prediction(str(path), file.shapes, file.metadata, {}))
        warn_of_coarse_weights(file)
        reader = in_usual_form(file)
        model: SdxlModel = without_weights(reader, empty_model, SDXL_BASE)
        model.prediction = predicted
        parts = [part for part in _parts(model, dtypes) if with_vae or part[0] is not model.vae]
        if transposed_text_projection:
            parts = [(network, _with_transposed_projection(table), dtype) for network, table, dtype in parts]
        elif any(key.startswith(_ONETRAINER_PREFIX) for key in file.metadata) and TEXT_PROJECTION in file.shapes:
            log.warning(
                "'%s' was written by OneTrainer, which stores G's text projection transposed: add"
                " --transposed_text_projection to read it right",
                path,
            )
        for network, table, _ in parts:
            require_tensors(reader, network, table)
        not_finite: list[str] = []
        for network, table, dtype in parts:
            network.eval()
            if with_unet or network is not model.unet:
                not_finite += _fill(reader, network, table, dtype)
        require_finite(str(path), not_finite)
        if LOGIT_SCALE in reader.shapes:
            model.logit_scale = reader.get(LOGIT_SCALE).clone()
        _report_unused(reader, {stored.name for _, table, _ in parts for stored in table}, with_vae=with_vae)
    return model


def read_unet_into(unet: nn.Module, path: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Read the weights of a U-Net without weights straight to `device`: host memory holds one of them at a time.

    Raise `UserError` for a file that is damaged, or holds NaN or Inf.
    """
    with open_tensors(path) as file:
        reader, table = in_usual_form(file), unet_table(unet)
        require_tensors(reader, unet, table)
        require_finite(str(path), _fill(reader, unet, table, dtype, device))


@contextmanager
def mapped_single_file(path: Path) -> Iterator[tuple[SdxlModel, Replacing]]:
    """Yield the model of a single file without weights, and what reads each of its tensors from the mapped file.

    So a changed copy can be written in memory for one tensor. Raise `UserError` for a file that is damaged, of another
    model family, quantised, lacks tensors of SDXL or holds them in other shapes.
    """
    with open_tensors(path) as file:
        reader = in_usual_form(file)
        model: SdxlModel = without_weights(reader, empty_model, SDXL_BASE)
        places: dict[tuple[int, str], tuple[StoredTensor, tuple[int, ...], int]] = {}
        for network, table, _ in _parts(model, ModelDtypes()):
            require_tensors(reader, network, table)
            shapes = expected_shapes(network, table)
            for stored in table:
                for index, name in enumerate(stored.parameters):
                    places[id(network), name] = stored, shapes[stored.name], index
        if LOGIT_SCALE in reader.shapes:
            model.logit_scale = reader.get(LOGIT_SCALE).clone()

        def read(network: nn.Module, name: str) -> torch.Tensor:
            stored, shape, index = places[id(network), name]
            return list(stored.to_parameters(reader.get(stored.name).reshape(shape)))[index]

        yield model, read


def read_vae(path: Path, dtype: torch.dtype | None, architecture: Architecture = SDXL_BASE) -> AutoencoderKL:
    """Return the VAE alone, from an SDXL single file or a VAE file (original or diffusers names).

    `architecture` is assumed for a file that does not record one. Raise as `read_single_file`.
    """
    with open_tensors(path) as file:
        reader = in_usual_form(file)
        vae: AutoencoderKL = without_weights(reader, empty_vae, architecture)
        table = _vae_table_of(reader, vae)
        require_tensors(reader, vae, table)
        require_finite(str(path), _fill(reader, vae, table, dtype))
    return vae.eval()


def _with_transposed_projection(table: list[StoredTensor]) -> list[StoredTensor]:
    return [replace(stored, form=Form.SAME) if stored.name == TEXT_PROJECTION else stored for stored in table]


def _vae_table_of(reader: TensorReader, vae: nn.Module) -> list[StoredTensor]:
    """Return the table for the names in use: of a whole checkpoint, of a VAE file, or of diffusers."""
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


def _fill(
    reader: TensorReader,
    network: nn.Module,
    table: list[StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device = CPU,
) -> list[str]:
    """Load the weights into `network`; return the names of those with NaN or Inf, in the file or in `dtype`."""
    weights, not_finite = {}, []
    expected = expected_shapes(network, table)
    for stored in table:
        parts = stored.to_parameters(reader.get(stored.name).reshape(expected[stored.name]))
        for name, part in zip(stored.parameters, parts, strict=True):
            # A copy even where nothing is converted: weights that stay mapped would lock the file on Windows.
            weights[name] = part.to(device, dtype or part.dtype, copy=True, memory_format=torch.contiguous_format)
        if not all(is_finite(weights[name]) for name in stored.parameters):
            not_finite.append(stored.name)
    network.load_state_dict(weights, assign=True)
    return not_finite


def _report_unused(reader: TensorReader, used: set[str], *, with_vae: bool) -> None:
    known = {*used, LOGIT_SCALE, *MARKERS, ZERO_TERMINAL_SNR_MARKER}
    ignored = () if with_vae else (PREFIX_VAE,)
    unused = [
        name
        for name in reader.shapes
        if name not in known and not name.endswith(".position_ids") and not name.startswith(ignored)
    ]
    if unused:
        log.warning(
            "'%s': %d tensors are not part of SDXL and are left out: %s",
            reader.path,
            len(unused),
            listed(unused, limit=5),
        )


# -- writing ----------------------------------------------------------------------------------------------------------


def tensors_to_write(
    model: SdxlModel, dtype: torch.dtype | None, replacing: Replacing | None = None
) -> Iterator[TensorToWrite]:
    """Yield every tensor of the single file in its order, in `dtype` (None: as held in memory), made one at a time."""
    for network, table, _ in _parts(model, ModelDtypes()):
        parameters = network.state_dict()
        for stored in table:
            tensors = [parameters[name] for name in stored.parameters]
            shape = stored.from_parameters([tensor.to("meta") for tensor in tensors]).shape
            make = _Joined(stored, network, tensors, replacing)
            yield TensorToWrite(stored.name, tuple(shape), dtype or tensors[0].dtype, make)
    yield TensorToWrite(
        LOGIT_SCALE, tuple(model.logit_scale.shape), dtype or model.logit_scale.dtype, lambda: model.logit_scale
    )
    for marker in model.prediction.markers():
        yield TensorToWrite(marker, (0,), torch.float32, partial(torch.empty, 0))


@dataclass(frozen=True)
class _Joined:
    stored: StoredTensor
    network: nn.Module
    tensors: list[torch.Tensor]
    replacing: Replacing | None

    def __call__(self) -> torch.Tensor:
        named = zip(self.stored.parameters, self.tensors, strict=True)
        return self.stored.from_parameters([written(self.replacing, self.network, name, held) for name, held in named])


def write_single_file(
    path: Path,
    model: SdxlModel,
    dtype: torch.dtype | None,
    metadata: dict[str, str],
    replacing: Replacing | None = None,
) -> None:
    """Write the model as one `.safetensors` (streamed: memory for one tensor) or, by its name, one `.ckpt` file.

    `dtype` is the precision in the file, None keeps what is in memory. `metadata` goes into the header, with the hash
    of the weights (of a `.ckpt`: beside the tensors, without hash), and architecture and prediction type where they are
    not those of SDXL base. `replacing` names tensors to write in place of those in memory. Raise `UserError` where
    `path` cannot be written.
    """
    if model.architecture != SDXL_BASE:
        metadata = {**metadata, ARCHITECTURE_KEY: model.architecture.to_json()}
    if model.prediction != SDXL_PREDICTION:
        metadata = {**metadata, **model.prediction.header()}
    if path.suffix.lower() == ".ckpt":
        write_pickle(path, tensors_to_write(model, dtype, replacing), metadata)
    else:
        write_safetensors(path, tensors_to_write(model, dtype, replacing), metadata, hash_key=HASH_KEY)
