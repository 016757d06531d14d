"""The source of a model: a single file, a diffusers folder or a name on the hub."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.config.errors import UserError
from library.config.options import option
from library.sdxl.prediction import EPSILON, SDXL_PREDICTION, Prediction
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS, PredictionOptions

if TYPE_CHECKING:  # a mistake on the command line is answered before these are imported
    import torch
    from diffusers import AutoencoderKL
    from torch import nn

    from library.sdxl.architecture import Architecture, SdxlModel
    from library.sdxl.checkpoint_file import ModelDtypes

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # ".0" is the end of a hub name


@dataclass(frozen=True)
class ModelOptions:
    """The model to fine-tune."""

    _argument_group_name: ClassVar[str] = "Model"

    pretrained_model_name_or_path: str | None = option(
        None, "SDXL model to start from: a .safetensors or .ckpt file, a diffusers folder, or a name on the hub."
    )
    vae: str | None = option(
        None, "Use this VAE instead of the model's: a file or a diffusers folder. It is saved with the model."
    )
    no_half_vae: bool = option(False, "Run the VAE in float32 whatever --mixed_precision is.")

    legacy_text_projection: bool = option(
        False, "Compute G's pooled vector with the transposed matrix, as kohya's trainers do, to continue their models."
    )
    transposed_text_projection: bool = option(
        False, "Read G's text projection transposed, as OneTrainer's single files store it. It is saved the usual way."
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.pretrained_model_name_or_path is None:
            yield "--pretrained_model_name_or_path is missing: name the SDXL checkpoint to start from."
        for flag, source in (
            ("pretrained_model_name_or_path", self.pretrained_model_name_or_path),
            ("vae", self.vae),
        ):
            if source is not None and not _exists(source) and not _may_be_hub_name(source):
                yield f"--{flag}: there is no '{source}'."
        if self.transposed_text_projection and self.legacy_text_projection:
            yield (
                "--transposed_text_projection and --legacy_text_projection exclude each other: the first is for files"
                " of OneTrainer, the second for models of kohya's trainers."
            )


def read_prediction(options: ModelOptions, wanted: PredictionOptions) -> Prediction:
    """Return what is trained, and log it unless it is as in SDXL base; no weights are read.

    Raise `UserError` for a model that is not known here or contradicts `wanted`.
    """
    from library.sdxl.checkpoint_file import prediction_of_file
    from library.sdxl.diffusers_folder import prediction_of_folder

    source = options.pretrained_model_name_or_path or ""
    found = prediction_of_file(Path(source)) if _is_file(source) else prediction_of_folder(source)
    prediction = wanted.settled(source, found)
    if wanted.convert_prediction:
        log.info("'%s' predicts %s and is moved to %s", source, found.prediction, prediction)
    elif prediction != SDXL_PREDICTION or wanted != AS_THE_MODEL_SAYS:
        log.info("the model predicts %s: %s", prediction, ", ".join(found.places) or "as the flags say")
    if prediction.kind == EPSILON and prediction.has_zero_terminal_snr:
        log.warning(
            "zero terminal SNR is made for models that predict velocity: one that predicts noise learns nothing from "
            "the last timestep, where its input is the noise; a model can be moved with --v_parameterization "
            "--convert_prediction"
        )
    return prediction


def architecture_of(options: ModelOptions) -> "Architecture":
    """Return the sizes of the model's networks; no weights are read. Raise `UserError` if it is damaged."""
    from library.sdxl.file_architecture import architecture_of_file
    from library.sdxl.folder_configs import architecture_of_folder

    source = options.pretrained_model_name_or_path or ""
    return architecture_of_file(Path(source)) if _is_file(source) else architecture_of_folder(source)


def load_model(
    options: ModelOptions,
    dtypes: "ModelDtypes",
    prediction: PredictionOptions = AS_THE_MODEL_SAYS,
    *,
    with_unet: bool = True,
) -> "SdxlModel":
    """Return the model that the options name, on the CPU; without `with_unet` its U-Net has no weights yet.

    Raise `UserError` if it is damaged, not SDXL, or contradicts `prediction`.
    """
    from library.sdxl.architecture import SDXL_BASE, recorded_facts
    from library.sdxl.checkpoint_file import read_single_file
    from library.sdxl.diffusers_folder import read_diffusers_folder
    from library.sdxl.text_encoding import use_legacy_text_projection

    source = options.pretrained_model_name_or_path
    if source is None:
        raise UserError("--pretrained_model_name_or_path is missing.", "Name the SDXL checkpoint to start from.")
    has_other_vae = options.vae is not None
    if _is_file(source):
        model = read_single_file(
            Path(source),
            dtypes,
            with_vae=not has_other_vae,
            with_unet=with_unet,
            transposed_text_projection=options.transposed_text_projection,
            prediction=prediction,
        )
    elif options.transposed_text_projection:
        raise UserError(
            f"--transposed_text_projection is for single files; '{source}' is a diffusers model.", "Remove the flag."
        )
    else:
        model = read_diffusers_folder(
            source, dtypes, with_vae=not has_other_vae, with_unet=with_unet, prediction=prediction
        )
    if options.vae is not None:
        model.vae = load_vae(options.vae, dtypes.vae, model.architecture)
        model.architecture = replace(model.architecture, vae=recorded_facts(model.vae.config, SDXL_BASE.vae))
    if options.legacy_text_projection:
        log.warning(
            "--legacy_text_projection: G's pooled vector is computed with the transposed matrix, unlike OpenCLIP, "
            "diffusers, ComfyUI and WebUIs. Use it only to continue a model that was trained this way."
        )
        use_legacy_text_projection(model.text_encoder_g)
    return model


def load_unet(options: ModelOptions, unet: "nn.Module", dtype: "torch.dtype | None", device: "torch.device") -> None:
    """Read the weights of the U-Net of a model that `load_model` has left without, to `device`. Raise as it does."""
    from library.sdxl.checkpoint_file import read_unet_into
    from library.sdxl.diffusers_folder import read_unet_of_folder_into

    source = options.pretrained_model_name_or_path or ""
    if _is_file(source):
        read_unet_into(unet, Path(source), dtype, device)
    else:
        read_unet_of_folder_into(unet, source, dtype, device)


def load_vae(source: str, dtype: "torch.dtype | None", architecture: "Architecture | None" = None) -> "AutoencoderKL":
    """Return the VAE alone, from a checkpoint, a VAE file or a diffusers folder; nothing else is read.

    `architecture` is assumed for a file that does not record one; None stands for SDXL base.
    """
    from library.sdxl.architecture import SDXL_BASE
    from library.sdxl.checkpoint_file import read_vae
    from library.sdxl.diffusers_folder import read_diffusers_vae

    if _is_file(source):
        return read_vae(Path(source), dtype, architecture or SDXL_BASE)
    return read_diffusers_vae(source, dtype).eval()


def _is_file(source: str) -> bool:
    if Path(source).is_dir():
        return False
    return Path(source).is_file() or not _may_be_hub_name(source)


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # too long to be the name of anything
        return False


def _may_be_hub_name(source: str) -> bool:
    """Return whether this could be "owner/name" on the hub rather than a path that does not exist."""
    return _HUB_NAME.fullmatch(source) is not None and Path(source).suffix.lower() not in _CHECKPOINT_SUFFIXES
