"""What a run left on disk, found by its record: samples, grids, models, states, logs."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from library.config.errors import UserError
from library.samples.contact_sheet import Samples, find_samples, last_steps
from library.samples.picture_files import SAMPLE_FOLDER, find_grids
from library.training.run_record import RunRecord
from library.training.saves import may_be_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """What a run left: images by prompt and step, `grids` by step, `files` are models and states.

    `log_folder` is None for a run without logs; it need not exist.
    """

    record: RunRecord
    samples: Samples = field(default_factory=dict)
    grids: Mapping[int, Path] = field(default_factory=dict)
    files: Sequence[Path] = ()
    log_folder: Path | None = None


def span_of(record: RunRecord, records: Sequence[RunRecord]) -> tuple[datetime, datetime]:
    """Return from when and until when files of its name are the run's; `records` are those of all runs there."""
    started = datetime.fromisoformat(record.started)
    later = [datetime.fromisoformat(each.started) for each in records if each.output_name == record.output_name]
    return started, min((moment for moment in later if moment > started), default=datetime.max)


def find_run(
    output_dir: Path, record: RunRecord, records: Sequence[RunRecord], logs: Path | None, *, num_columns: int
) -> RunFiles:
    """Return what the run of `record` left in `output_dir`, with the samples of at most `num_columns` steps.

    `records` are those of all runs there: what was written after the next run of the same name began is its own.
    `logs` is the folder that the log folders lie in, where they were moved.
    """
    span = span_of(record, records)
    folder = output_dir / SAMPLE_FOLDER
    log_folder = None if record.log_folder is None else Path(record.log_folder)
    if logs is not None and log_folder is not None:
        log_folder = logs / log_folder.name
    return RunFiles(
        record,
        samples=_samples_of(folder, record, span, num_columns),
        grids=find_grids(folder, record.output_name, *span),
        files=sorted(saved_files(output_dir, record, span)),
        log_folder=log_folder,
    )


def _samples_of(folder: Path, record: RunRecord, span: tuple[datetime, datetime], num_columns: int) -> Samples:
    try:
        samples = find_samples(folder, record.output_name or "", span)
    except UserError as error:
        log.info(error.problem)
        return {}
    return last_steps(samples, num_columns)


def saved_files(output_dir: Path, record: RunRecord, span: tuple[datetime, datetime]) -> Iterator[Path]:
    """Yield the models and states that a run wrote in a span of time."""
    for path in output_dir.iterdir():
        if not may_be_of(record.output_name, path.name):
            continue
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime)
        except OSError:  # the run has replaced it at this moment
            continue
        if span[0] <= written < span[1]:
            yield path
