"""A tagger of the WD14 kind in ONNX Runtime: images to the probabilities of tags."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from library.annotation.reading_ahead import Described
from library.annotation.tag_choice import TagChoice
from library.config.errors import UserError, first_line
from library.images.reading import load_rgb

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

log = logging.getLogger(__name__)

_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider")
"""What a model runs on, the fastest first: NVIDIA, AMD, any GPU of Windows (DirectML), the processor."""
_NUMBERED = frozenset(_PROVIDERS[:3])
_WHITE = 255
_MEMORY = ("allocate", "out of memory", "bad_alloc", "bad allocation")


class Tagger:
    """A model with its labels: what `reading_ahead` calls a machine.

    The model takes float32 images [B, side, side, 3], blue first, 0-255, on white squares, and returns a probability
    for each label. `batch_size` is the one that it was made for, or None if it takes any.
    """

    def __init__(self, session: "InferenceSession", choice: TagChoice, separator: str, model: Path):
        self._session = session
        self._choice = choice
        self._separator = separator
        self._model = model
        [image], outputs = session.get_inputs(), session.get_outputs()
        self._input = image.name
        self._output = outputs[0].name
        self._side = int(image.shape[1])
        self.batch_size: int | None = image.shape[0] if isinstance(image.shape[0], int) else None

    def load(self, path: Path) -> np.ndarray:
        """Return the image on a white square [side, side, 3], blue first. Raise `UserError` if it cannot be read."""
        image = load_rgb(path)
        scale = self._side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # as the models' makers do
        left, top = (self._side - width) // 2, (self._side - height) // 2
        square = np.full((self._side, self._side, 3), _WHITE, np.uint8)
        square[top : top + height, left : left + width] = pixels
        return square[:, :, ::-1]

    def prepare(self, loaded: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
        """Return a batch [B, side, side, 3] of as many images as the model takes, and how many of them are `loaded`."""
        num_images = len(loaded) if self.batch_size is None else max(len(loaded), self.batch_size)
        batch = np.zeros((num_images, self._side, self._side, 3), np.float32)
        for place, square in enumerate(loaded):
            batch[place] = square
        return batch, len(loaded)

    def describe(self, prepared: tuple[np.ndarray, int]) -> list[Described]:
        """Return the tags of each image of a batch."""
        batch, num_images = prepared
        return [self._tagged(row) for row in self.probabilities(batch)[:num_images]]

    def probabilities(self, batch: np.ndarray) -> list[list[float]]:
        """Return the probability of each label [B, labels]. Raise `UserError` where the model cannot be run."""
        try:
            result = self._run(batch)
        except _errors() as error:
            if any(word in str(error).lower() for word in _MEMORY):
                raise UserError(
                    f"out of memory with {len(batch)} images of {self._side} x {self._side} at once "
                    f"({first_line(error)}).",
                    "Lower --batch_size, and start again: what is written stays and is skipped.",
                ) from error
            raise UserError(f"'{self._model}' cannot be run: {first_line(error)}.", "Use another model.") from error
        if not (np.isfinite(result).all() and result.min() >= 0 and result.max() <= 1):
            raise UserError(
                f"'{self._model}' says numbers from {result.min():g} to {result.max():g}, which are no probabilities.",
                "Use a tagger of the WD14 kind, which ends in a sigmoid.",
            )
        rows: list[list[float]] = result.tolist()
        return rows

    def _run(self, batch: np.ndarray) -> np.ndarray:
        (result,) = self._session.run([self._output], {self._input: batch})
        return result

    def _tagged(self, probabilities: Sequence[float]) -> Described:
        tagged = self._choice.tags_of(probabilities)
        details = f"rating: {tagged.rating}; characters: {_list(tagged.characters)}; general: {_list(tagged.general)}"
        return Described(self._separator.join(tagged.written), tagged.written, details=details)


def open_tagger(model: Path, choice: TagChoice, separator: str) -> Tagger:
    """Return the tagger of a model file. Raise `UserError` for a model of another kind, or other labels."""
    session = _session(model)
    _require_wd14(session, model)
    num_labels = session.get_outputs()[0].shape[1]
    if isinstance(num_labels, int) and num_labels != len(choice.labels):
        raise UserError(
            f"the labels do not fit the model: '{model}' has {num_labels} outputs, its selected_tags.csv has "
            f"{len(choice.labels)} labels.",
            "Take both files from the same repository.",
        )
    return Tagger(session, choice, separator, model)


def _session(model: Path) -> "InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "the package onnxruntime, in which taggers run, is not installed.",
            "pip install -r requirements-caption.txt (or onnxruntime-gpu, onnxruntime-directml in its place).",
        ) from error
    if not model.is_file():
        raise UserError(f"there is no model '{model}'.", "Check --model_dir.")
    available = onnxruntime.get_available_providers()
    wanted = [name for name in _PROVIDERS if name in available]
    providers: list[Any] = [(name, _device(name)) for name in wanted]
    try:
        session = onnxruntime.InferenceSession(str(model), _session_options(onnxruntime), providers=providers)
    except _errors() as error:
        raise UserError(
            f"'{model}' cannot be read as an ONNX model: {first_line(error)}.", "Download or copy it again."
        ) from error
    used = session.get_providers()
    if used[0] != wanted[0]:
        log.warning(
            "%s cannot be used, the tagger runs with %s: check the driver and its libraries.", wanted[0], used[0]
        )
    log.info("tagger: '%s' with %s", model, used[0].removesuffix("ExecutionProvider"))
    return session


def _session_options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about kernels
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_local > 1:
        options.intra_op_num_threads = max(1, (os.cpu_count() or 1) // num_local)
    return options


def _device(provider: str) -> dict[str, str]:
    """Return the device of this process among those of the machine."""
    return {"device_id": os.environ.get("LOCAL_RANK", "0")} if provider in _NUMBERED else {}


def _require_wd14(session: "InferenceSession", model: Path) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    is_square = len(shape) == 4 and isinstance(shape[1], int) and shape[1:] == [shape[1], shape[1], 3]
    is_scored = len(outputs) == 1 and len(outputs[0].shape) == 2
    if not is_square or not is_scored or inputs[0].type != "tensor(float)":
        takes = ", ".join(f"{each.name} {each.shape} {each.type}" for each in inputs)
        returns = ", ".join(f"{each.name} {each.shape}" for each in outputs)
        raise UserError(
            f"'{model}' is no tagger of the WD14 kind: it takes {takes} and returns {returns}.",
            "Expected one float image [batch, side, side, 3] and one list of probabilities [batch, labels].",
        )


def _errors() -> tuple[type[BaseException], ...]:
    """Return what ONNX Runtime raises; its errors have no class in common but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented")
    found = [getattr(state, name, None) for name in (*names, "RuntimeException", "EPFail", "ModelLoadCanceled")]
    return (MemoryError, ValueError, *(each for each in found if each is not None))


def _list(tags: Sequence[str]) -> str:
    return ", ".join(tags) or "-"
