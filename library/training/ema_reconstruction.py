"""The model of any EMA length, from the snapshots of a run: which to combine, and the file, one tensor at a time."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library.config.atomic_files import require_disk_space
from library.config.errors import UserError
from library.optim.ema_profiles import (
    LEAST_SIGMA_REL,
    MOST_SIGMA_REL,
    Moment,
    PowerFunction,
    combination,
)
from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes, mapped_single_file, write_single_file
from library.sdxl.diffusers_folder import read_diffusers_folder, write_diffusers_folder
from library.sdxl.prediction import Prediction
from library.sdxl.tensor_file import Replacing, TensorReader, open_tensors
from library.training.ema_snapshots import Snapshot

log = logging.getLogger(__name__)

MOST_ERROR = 0.1
"""How far a combination may be from the profile that was asked for, relative to it: below it, none can tell them apart
(figure 15 of the paper: images are as good as with the average itself)."""

_NEGLIGIBLE = 1e-12
_SINGLE_FILES = (".safetensors", ".ckpt")


def factors_of(snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None) -> list[tuple[Snapshot, float]]:
    """Return the snapshots to combine to the average of that length at `step` (None: the last), each with its factor.

    Raise `UserError` for a length, or a step, that they are too few for.
    """
    last = snapshots[-1].record
    step = last.step if step is None else step
    begun = last.step - last.num_steps
    if not begun < step <= last.step:
        raise UserError(
            f"--step is {step}; the snapshots are of steps {snapshots[0].record.step} to {last.step}.",
            f"Choose a step from {begun + 1} to {last.step}.",
        )
    kept = [Moment(PowerFunction(each.record.sigma_rel), each.record.num_steps) for each in snapshots]
    found = combination(kept, Moment(PowerFunction(sigma_rel), step - begun))
    if not found.error <= MOST_ERROR:
        raise UserError(
            f"--sigma_rel is {sigma_rel:g}: the nearest combination of these {len(snapshots)} snapshots is "
            f"{found.error:.0%} away from that length after step {step}; {MOST_ERROR:.0%} are allowed.",
            _remedy(kept, step - begun),
        )
    log.info(
        "EMA of sigma_rel %g after step %d, from %d snapshots: its profile is met to %.1f %%",
        sigma_rel,
        step,
        len(snapshots),
        100 * found.error,
    )
    return [(each, factor) for each, factor in zip(snapshots, found.factors, strict=True) if abs(factor) > _NEGLIGIBLE]


def _remedy(kept: Sequence[Moment], num_steps: int) -> str:
    widths = [number / 1000 for number in range(round(1000 * LEAST_SIGMA_REL), round(1000 * MOST_SIGMA_REL) + 1, 5)]
    possible = [
        width for width in widths if combination(kept, Moment(PowerFunction(width), num_steps)).error <= MOST_ERROR
    ]
    if not possible:
        return "Choose the step of a snapshot."
    return f"Choose a length from {possible[0]:g} to {possible[-1]:g}, or train with more frequent snapshots."


def reconstruct(
    factors: Sequence[tuple[Snapshot, float]], source: str, output: Path, dtype: torch.dtype, notes: Mapping[str, str]
) -> None:
    """Write the combination as a model: one file, or a diffusers folder where `output` has no suffix of one.

    What was not trained comes from the model `source`. `notes` are added to the header. Memory is that of one tensor,
    beside the whole `source` where that is a diffusers folder. Raise `UserError` for snapshots that are damaged or of
    another model, and where `output` cannot be written.
    """
    for snapshot, _ in factors:
        snapshot.require_whole()
    with ExitStack() as stack:
        opened = [(stack.enter_context(open_tensors(snapshot.path)), factor) for snapshot, factor in factors]
        model, read = stack.enter_context(_untrained_parts(source))
        model.prediction = Prediction(**factors[-1][0].record.prediction)
        parts = {"unet": model.unet, "text_encoder_l": model.text_encoder_l, "text_encoder_g": model.text_encoder_g}
        for reader, _ in opened:
            _require_of_model(reader, parts, source)
        names = {id(network): name for name, network in parts.items()}
        replacing = partial(_averaged, opened, names, read)
        num_weights = sum(tensor.numel() for network in model.networks for tensor in network.state_dict().values())
        require_disk_space(output.parent, num_weights * dtype.itemsize, f"'{output.name}'")
        log.info("saving '%s'", output.name)
        if output.suffix.lower() in _SINGLE_FILES:
            header = dict(factors[-1][0].record.header) | {
                "modelspec.title": output.stem,
                "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_single_file(output, model, dtype, {**header, **notes}, replacing)
        else:
            write_diffusers_folder(output, model, dtype, replacing)
    log.info("saved '%s'", output)


@contextmanager
def _untrained_parts(source: str) -> Iterator[tuple[SdxlModel, Callable[[nn.Module, str], torch.Tensor | None]]]:
    """Yield the model, and what returns those of its tensors that it does not hold itself."""
    if Path(source).is_file():
        with mapped_single_file(Path(source)) as mapped:
            yield mapped
    else:
        yield read_diffusers_folder(source, ModelDtypes()), lambda network, name: None


def _require_of_model(reader: TensorReader, parts: Mapping[str, nn.Module], source: str) -> None:
    """Raise `UserError` unless the model has every tensor of the snapshot, in the same shape."""
    expected = {
        f"{part}.{name}": tuple(tensor.shape)
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
    }
    strange = [name for name, shape in reader.shapes.items() if expected.get(name) != shape]
    if strange or not reader.shapes:
        example = f", such as {strange[0]} {list(reader.shapes[strange[0]])}" if strange else ""
        raise UserError(
            f"'{reader.path}' is a snapshot of another model than '{source}': {len(strange)} of its tensors are not in "
            f"that{example}.",
            "Pass the model that was fine-tuned, or one that the run saved, as --pretrained_model_name_or_path.",
        )


def _averaged(
    opened: Sequence[tuple[TensorReader, float]],
    parts: Mapping[int, str],
    read: Replacing,
    network: nn.Module,
    name: str,
) -> torch.Tensor | None:
    """Return the combination of a tensor in float32, or that of the model where it was not trained."""
    key = f"{parts.get(id(network))}.{name}"
    holding = [(reader, factor) for reader, factor in opened if key in reader.shapes]
    if not holding:
        return read(network, name)
    total: torch.Tensor | None = None
    for reader, factor in holding:
        tensor = reader.get(key)
        total = tensor.float() * factor if total is None else total.add_(tensor, alpha=factor)
    return total
