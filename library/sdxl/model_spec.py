"""The header of a checkpoint file: what the model is and who made it, as WebUIs and model managers show it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

from library.config.file_names import text_problem
from library.config.options import option
from library.sdxl.prediction import SDXL_PREDICTION

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class ModelSpecOptions:
    """What the user says of the model in the file's header."""

    _argument_group_name: ClassVar[str] = "Header of the checkpoint"

    metadata_title: str | None = option(None, "Title of the model. Default: the output name.")
    metadata_author: str | None = option(None, "Who made it.")
    metadata_description: str | None = option(None, "What it is.")
    metadata_license: str | None = option(None, "License of the model.")
    metadata_tags: str | None = option(None, "Tags, separated by commas.")

    def problems(self) -> Iterator[str]:
        """Yield which of the texts no file can hold."""
        for name, text in vars(self).items():
            if text is not None and (problem := text_problem(text)):
                yield f"--{name}: {problem}. Correct the text."


def model_spec(
    options: ModelSpecOptions,
    *,
    name: str,
    resolution: tuple[int, int],
    timesteps: tuple[int, int] | None,
    now: datetime,
) -> dict[str, str]:
    """Return the modelspec 1.0.0 keys (https://github.com/Stability-AI/ModelSpec) of an SDXL checkpoint.

    `resolution` is (width, height) of training, `timesteps` the range trained on where it is not all of them,
    `now` the time of saving.
    """
    return dict(_entries(options, name, resolution, timesteps, now))


def _entries(
    options: ModelSpecOptions,
    name: str,
    resolution: tuple[int, int],
    timesteps: tuple[int, int] | None,
    now: datetime,
) -> Iterator[tuple[str, str]]:
    yield "modelspec.sai_model_spec", "1.0.0"
    yield "modelspec.architecture", "stable-diffusion-xl-v1-base"
    yield "modelspec.implementation", _IMPLEMENTATION
    yield "modelspec.title", options.metadata_title or name
    yield "modelspec.resolution", f"{resolution[0]}x{resolution[1]}"
    yield "modelspec.prediction_type", SDXL_PREDICTION.kind
    yield "modelspec.date", now.astimezone(UTC).isoformat(timespec="seconds")
    if timesteps is not None:
        yield "modelspec.timestep_range", f"{timesteps[0]},{timesteps[1]}"
    for field in ("author", "description", "license", "tags"):
        value = getattr(options, f"metadata_{field}")
        if value:
            yield f"modelspec.{field}", value
