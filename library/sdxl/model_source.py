"""Where the model comes from: a single file, a diffusers folder or a name of the hub."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL

from library.config.errors import UserError
from library.config.options import option
from library.sdxl.architecture import SDXL_BASE, Architecture, SdxlModel, recorded_facts
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, read_vae
from library.sdxl.diffusers_folder import read_diffusers_folder, read_diffusers_vae
from library.sdxl.text_encoding import use_legacy_text_projection

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # ".0" is the end of a hub name


@dataclass(frozen=True)
class ModelOptions:
    """Which model is fine-tuned."""

    _argument_group_name: ClassVar[str] = "Model"

    pretrained_model_name_or_path: str | None = option(
        None, "SDXL to start from: a .safetensors or .ckpt file, a diffusers folder, or a name of the hub."
    )
    vae: str | None = option(None, "Another VAE: a file or a diffusers folder. It is saved with the model.")
    no_half_vae: bool = option(False, "Run the VAE in float32 whatever the precision of training is.")

    legacy_text_projection: bool = option(
        False, "Compute G's pooled vector by the transposed matrix, as kohya's trainers do, to continue their models."
    )

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.pretrained_model_name_or_path is None:
            yield "--pretrained_model_name_or_path is missing: name the SDXL checkpoint to start from."
        for flag, source in (
            ("pretrained_model_name_or_path", self.pretrained_model_name_or_path),
            ("vae", self.vae),
        ):
            if source is not None and not _exists(source) and not _may_be_hub_name(source):
                yield f"--{flag}: there is no '{source}'."


def load_model(options: ModelOptions, dtypes: ModelDtypes) -> SdxlModel:
    """The model that the options name, on the CPU; raises `UserError` where it is none or damaged."""
    source = options.pretrained_model_name_or_path
    if source is None:
        raise UserError("--pretrained_model_name_or_path is missing.", "Name the SDXL checkpoint to start from.")
    model = read_single_file(Path(source), dtypes) if _is_file(source) else read_diffusers_folder(source, dtypes)
    if options.vae is not None:
        model.vae = load_vae(options.vae, dtypes.vae, model.architecture)
        model.architecture = replace(model.architecture, vae=recorded_facts(model.vae.config, SDXL_BASE.vae))
    if options.legacy_text_projection:
        print(
            "--legacy_text_projection: G's pooled vector is computed by the transposed matrix, unlike OpenCLIP, "
            "diffusers, ComfyUI and WebUIs. Use it only to go on with a model that was trained so.",
            file=sys.stderr,
        )
        use_legacy_text_projection(model.text_encoder_g)
    return model


def load_vae(source: str, dtype: torch.dtype | None, architecture: Architecture = SDXL_BASE) -> AutoencoderKL:
    """The VAE alone, out of a checkpoint, a VAE file or a diffusers folder; nothing else of it is read.

    `architecture` is what a file without a note of its own is taken for.
    """
    if _is_file(source):
        return read_vae(Path(source), dtype, architecture)
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
    """Whether this could be "owner/name" of the hub rather than a path that does not exist."""
    return _HUB_NAME.fullmatch(source) is not None and Path(source).suffix.lower() not in _CHECKPOINT_SUFFIXES
