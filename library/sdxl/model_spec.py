"""The header of a checkpoint file: what the model is and who made it, as WebUIs and model managers show it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import ClassVar

from library.config.errors import UserError
from library.config.file_names import text_problem
from library.config.options import option
from library.sdxl.prediction import SDXL_PREDICTION

VERSION = "1.0.1"
HASH_KEY = "modelspec.hash_sha256"
NO_THUMBNAIL = "off"

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
_OF_THE_SOURCE = ("author", "license")
"""What the header of the source file says that holds for a model made from it as well."""


@dataclass(frozen=True)
class ModelSpecOptions:
    """What the user says of the model in the file's header."""

    _argument_group_name: ClassVar[str] = "Header of the checkpoint"

    metadata_title: str | None = option(None, "Title of the model. Default: the output name.")
    metadata_author: str | None = option(None, "Who made it. Default: the author in the header of the source file.")
    metadata_description: str | None = option(None, "What it is. Default: a sentence with the name of the source.")
    metadata_license: str | None = option(
        None, "License of the model. Default: the license in the header of the source file."
    )
    metadata_tags: str | None = option(None, "Tags, separated by commas.")
    metadata_usage_hint: str | None = option(None, "A short hint for whoever uses the model.")
    metadata_trigger_phrase: str | None = option(
        None, "Phrase that the model needs in a prompt; some UIs add it by themselves."
    )
    metadata_merged_from: str | None = option(
        None, "Titles of the models that were merged into the source, separated by commas."
    )
    metadata_thumbnail: str | None = option(
        None,
        "Preview of the model: an image file, or a data URL of an image. Stored as a JPEG of 256x256. Default: the "
        f"newest sample of the run after its first step. '{NO_THUMBNAIL}' leaves it out.",
    )

    def problems(self) -> Iterator[str]:
        """Yield which of the texts no file can hold."""
        for each in fields(self):
            text = getattr(self, each.name)
            if text is not None and (problem := text_problem(text)):
                yield f"--{each.name}: {problem}. Correct the text."

    def heavy_problems(self) -> Iterator[str]:
        """Yield why the thumbnail cannot be shown: it is read."""
        from library.sdxl.thumbnail import thumbnail_of

        if self.metadata_thumbnail not in (None, NO_THUMBNAIL):
            try:
                thumbnail_of(str(self.metadata_thumbnail))
            except UserError as error:
                yield f"--metadata_thumbnail: {error}"


def model_spec(
    options: ModelSpecOptions,
    *,
    name: str,
    description: str,
    resolution: tuple[int, int],
    timesteps: range | None,
    now: datetime,
    source: Mapping[str, str],
    thumbnail: str | None = None,
) -> dict[str, str]:
    """Return the modelspec keys (https://github.com/Stability-AI/ModelSpec) of an SDXL checkpoint.

    The hash of the weights is not among them: `write_safetensors` computes it. `name` and `description` stand where
    the options say nothing. `resolution` is (width, height) of training, `timesteps` the range trained on where it is
    not all of them, `now` the time of saving, `source` the header of the file that training started from, `thumbnail`
    a data URL.
    """
    return dict(_entries(options, name, description, resolution, timesteps, now, source, thumbnail))


def _entries(
    options: ModelSpecOptions,
    name: str,
    description: str,
    resolution: tuple[int, int],
    timesteps: range | None,
    now: datetime,
    source: Mapping[str, str],
    thumbnail: str | None,
) -> Iterator[tuple[str, str]]:
    yield "modelspec.sai_model_spec", VERSION
    yield "modelspec.architecture", "stable-diffusion-xl-v1-base"
    yield "modelspec.implementation", _IMPLEMENTATION
    yield "modelspec.title", options.metadata_title or name
    yield "modelspec.resolution", f"{resolution[0]}x{resolution[1]}"
    yield "modelspec.prediction_type", SDXL_PREDICTION.kind
    yield "modelspec.date", now.astimezone(UTC).isoformat(timespec="seconds")
    yield "modelspec.description", options.metadata_description or description
    if timesteps is not None:
        yield "modelspec.timestep_range", f"{timesteps[0]},{timesteps[-1]}"  # both ends are trained
    for field in _OF_THE_SOURCE:
        value = getattr(options, f"metadata_{field}") or source.get(f"modelspec.{field}")
        if value:
            yield f"modelspec.{field}", value
    for field in ("tags", "usage_hint", "trigger_phrase", "merged_from"):
        value = getattr(options, f"metadata_{field}")
        if value:
            yield f"modelspec.{field}", value
    if thumbnail is not None:
        yield "modelspec.thumbnail", thumbnail
