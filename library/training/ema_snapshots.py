"""Snapshots of moving averages: two files each, the tensors and a record that is written when these are whole."""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.config.atomic_files import CannotWrite, write_text
from library.config.digests import WrittenDigest, digest, file_digest
from library.config.errors import UserError, listed
from library.optim.ema_options import profile_name
from library.sdxl.tensor_file import TensorToWrite, first_line, write_safetensors
from library.training.saves import last_name, step_name

log = logging.getLogger(__name__)

_FORMAT = 1
_RECORD_SUFFIX = ".json"
_TENSOR_SUFFIX = ".safetensors"
_REMEDY = "Restore it from a copy, or move both of its files away to do without it."


@dataclass(frozen=True)
class SnapshotRecord:
    """What the record of a snapshot says.

    `run` tells the runs apart that share a folder. `num_steps` is the number of steps averaged, all up to `step` unless
    the average began later. `model` is the model that was fine-tuned, `header` that of a saved model, `prediction` what
    the U-Net predicts: the values of a `Prediction`.
    """

    run: str
    step: int
    num_steps: int
    sigma_rel: float
    model: str
    header: Mapping[str, str] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk: the file of its tensors, and its record."""

    path: Path
    record: SnapshotRecord

    def require_whole(self) -> None:
        """Raise `UserError` unless the file of the tensors is as it was written."""
        if not self.path.is_file():
            raise UserError(f"the snapshot '{self.path}' is missing; its record is there.", _REMEDY)
        if self.path.stat().st_size != self.record.bytes or file_digest(self.path) != self.record.digest:
            raise UserError(f"the snapshot '{self.path}' is damaged: it is not as it was written.", _REMEDY)


def snapshot_folder(output_dir: Path, output_name: str | None) -> Path:
    """Return the folder of the snapshots of a run."""
    return output_dir / f"{last_name(output_name)}-ema-snapshots"


def snapshot_path(folder: Path, output_name: str | None, step: int, sigma_rel: float) -> Path:
    """Return the file of a snapshot's tensors; its record is beside it, as .json."""
    return folder / f"{step_name(output_name, step)}-{profile_name(sigma_rel)}{_TENSOR_SUFFIX}"


def write_snapshot(path: Path, record: SnapshotRecord, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a snapshot, in memory for one tensor; it counts from when its record is there.

    Raise `CannotWrite` if that is impossible.
    """
    written = WrittenDigest()
    streamed = [TensorToWrite.of(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(path, streamed, {"format": "pt"}, written)
    about = asdict(record) | {"format": _FORMAT, "bytes": path.stat().st_size, "digest": written.hex()}
    text = json.dumps(about, ensure_ascii=False, indent=1)
    write_text(path.with_suffix(_RECORD_SUFFIX), json.dumps({"record": about, "digest": _digest_of(text)}, indent=1))


def find_snapshots(folder: Path, run: str | None = None) -> list[Snapshot]:
    """Return the snapshots of one run, by step and length; `run` names it where the folder holds those of several.

    Raise `UserError` if there are none, for records that are damaged, and where it is not clear which run is meant.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder '{folder}'.", "Name the folder of the snapshots: <output name>-ema-snapshots."
        )
    found = [_read_record(path) for path in sorted(folder.glob(f"*{_RECORD_SUFFIX}"))]
    unfinished = [
        f"'{path.name}'"
        for path in sorted(folder.glob(f"*{_TENSOR_SUFFIX}"))
        if not path.with_suffix(_RECORD_SUFFIX).is_file()
    ]
    if unfinished:
        log.warning("'%s': no record beside %s; not used", folder, listed(unfinished))
    if not found:
        raise UserError(
            f"'{folder}' holds no snapshots of moving averages.", "Train with --ema_snapshot_every_n_steps."
        )
    runs = sorted({snapshot.record.run for snapshot in found})
    if run is None and len(runs) > 1:
        names = [f"'{each}'" for each in runs]
        raise UserError(
            f"'{folder}' holds snapshots of {len(runs)} runs: {listed(names)}.", "Pass one of them as --run."
        )
    chosen = [snapshot for snapshot in found if run is None or snapshot.record.run == run]
    if not chosen:
        raise UserError(f"--run: '{folder}' holds no snapshots of '{run}'.", f"Its runs are {listed(runs)}.")
    return sorted(chosen, key=lambda snapshot: (snapshot.record.step, snapshot.record.sigma_rel))


class SnapshotSaver:
    """Saves snapshots; one that cannot be written is named, and the run continues.

    `record_of(name, step)` and `tensors_of(name)` return what is saved of the average of that name. Every process calls
    it; within `one_writer()` one of them writes.
    """

    def __init__(
        self,
        folder: Path,
        output_name: str | None,
        *,
        widths: Mapping[str, float],
        record_of: Callable[[str, float, int], SnapshotRecord],
        tensors_of: Callable[[str], Mapping[str, torch.Tensor]],
        one_writer: Callable[[], AbstractContextManager[bool]],
    ):
        self._folder = folder
        self._output_name = output_name
        self._widths = widths
        self._record_of = record_of
        self._tensors_of = tensors_of
        self._one_writer = one_writer

    def save(self, step: int) -> None:
        """Save the snapshots of a step."""
        with self._one_writer() as writes:
            for name, width in self._widths.items():
                tensors = self._tensors_of(name)  # of sharded weights all processes ask
                if not writes:
                    continue
                path = snapshot_path(self._folder, self._output_name, step, width)
                log.info("saving '%s'", path.name)
                try:
                    write_snapshot(path, self._record_of(name, width, step), tensors)
                except CannotWrite as error:
                    log.warning("'%s' is not saved. Training continues: %s", path.name, error)


def _read_record(path: Path) -> Snapshot:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = content["record"]
        if content["digest"] != _digest_of(json.dumps(about, ensure_ascii=False, indent=1)):
            raise ValueError("it is not as it was written")
        if about.pop("format") != _FORMAT:
            raise ValueError("it is of another version of this program")
        record = SnapshotRecord(**about)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not the record of a snapshot ({first_line(error)}).", _REMEDY) from error
    return Snapshot(path.with_suffix(_TENSOR_SUFFIX), record)


def _digest_of(text: str) -> str:
    return digest([text.encode()]).hex()
