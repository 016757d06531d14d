"""Everything that a training run leaves behind, in a form that can be compared bit by bit."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.config.leftovers import PARTIAL_SUFFIX, REPLACED_SUFFIX
from library.training.progress import STATE_SUFFIX

Outcome = dict[str, Any]
"""Name of a thing ("model m-step00000002", "curve loss/current") to what compares equal only if it is the same."""

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns where a resumed run goes on

_TIME = re.compile(r"\d{14}(?=_)")
_TIMED_CURVES = ("steps_per_second", "images_per_second", "memory/host_gib", "memory/gpu_peak_gib")


def outcome_of(output_dir: Path, logs: Path | None = None, images: Path | None = None) -> Outcome:
    """What a run has left: models, states, sample pictures, curves, latents, and whatever should not be there.

    Left out are the times in file names, logs and headers.
    """
    found = dict(_files(output_dir))
    if logs is not None:
        found |= dict(_curves(logs))
    if images is not None:
        found |= {f"latents {path.name}": _arrays(path) for path in sorted(images.rglob("*.npz"))}
        found |= {f"leftover {path.name}": True for path in _leftovers(images)}
    return found


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """What is missing, what is too much and what differs; nothing if the runs came to the same."""
    return [
        *(f"{name} is missing" for name in expected.keys() - found.keys()),
        *(f"{name} is too much" for name in found.keys() - expected.keys()),
        *(f"{name} differs" for name in expected.keys() & found.keys() if not _same(expected[name], found[name])),
    ]


def _files(output_dir: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(output_dir.iterdir()):
        if path.is_dir() and path.name.endswith(STATE_SUFFIX):
            yield f"state {path.name}", _state(path)
        elif path.is_dir() and path.name.endswith("-ema-snapshots"):
            for each in sorted(path.iterdir()):
                yield f"snapshot {each.name}", _snapshot(each)
        elif path.suffix == ".safetensors":
            yield f"model {path.stem}", load_file(path)
        elif path.name not in ("sample", "run"):
            yield f"leftover {path.name}", True
    pictures: set[str] = set()
    for path in sorted((output_dir / "sample").glob("*")):
        name = _TIME.sub("TIME", path.name)
        with Image.open(path) as image:
            shown = (
                image.size,
                image.tobytes(),
                sorted((key, value) for key, value in image.info.items() if isinstance(value, str)),
            )
        yield f"picture {name}{' again' if name in pictures else ''}", shown
        pictures.add(name)


def _state(folder: Path) -> Any:
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    others = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}
    tensors = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    place = [progress[key] for key in ("seed", "step", "epoch", "step_in_epoch", "losses")]
    return place, progress["setting"]["images"], tensors, others


def _snapshot(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    record = json.loads(path.read_text(encoding="utf-8"))["record"]
    return [record[key] for key in ("step", "num_steps", "sigma_rel", "bytes", "digest")]


def _curves(logs: Path) -> Iterator[tuple[str, Any]]:
    """Every curve with its steps; a run in more than one log folder has too much."""
    for number, folder in enumerate(sorted(path for path in logs.glob("*/*") if path.is_dir())):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
        run = "" if number == 0 else f" of log folder {number + 1}"
        for name in events.Tags()["scalars"]:
            if name not in _TIMED_CURVES:
                yield f"curve {name}{run}", [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["images"]:
            yield f"shown {name}{run}", [(shown.step, shown.encoded_image_string) for shown in events.Images(name)]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (PARTIAL_SUFFIX, REPLACED_SUFFIX)]


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and (one.is_meta or torch.equal(one, other))  # numbers of meta tensors are in files of shards
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
