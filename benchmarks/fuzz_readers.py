"""The functions that read files, on damaged files: thousands in the time in which a script runs once (POSIX)."""

import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.damaged_bytes import damages_of
from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import parse_options
from library.data.latent_cache import read_cache
from library.data.metadata import read_metadata
from library.data.strict_json import read_utf8
from library.images.reading import load_rgb_and_alpha, read_size
from library.samples.prompts import read_prompt_file
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.tensor_file import open_tensors
from library.training.progress import read_progress
from library.training.run_options import OPTION_CLASSES, TrainingOptions

MOST_SECONDS = 20.0


@dataclass(frozen=True)
class Reader:
    """A function that reads one kind of file, and which files of the prepared folder are of it."""

    name: str
    pattern: str
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Reading:
    """How the reading of a damaged file ended; `fault` is "" if it was read, or refused by a `UserError`."""

    reader: str
    damage: str
    is_refused: bool
    seconds: float
    fault: str


def _read_tensors(path: Path) -> None:
    with open_tensors(path) as reader:
        for name in reader.shapes:
            reader.get(name)


def _read_image(path: Path) -> None:
    read_size(path)
    load_rgb_and_alpha(path)


def _read_options(path: Path) -> None:
    arguments = [
        f"--config_file={path}",
        "--pretrained_model_name_or_path=owner/name",
        f"--train_data_dir={path.parent}",
    ]
    parse_options(
        OPTION_CLASSES,
        [*arguments, f"--in_json={path}", "--output_dir=output"],
        description="",
        spellings=TRAINER_SPELLINGS,
        conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
    )


READERS = (
    Reader("VAE in a checkpoint", "model.safetensors", lambda path: read_vae(path, None)),
    Reader("VAE in a pickled checkpoint", "model.ckpt", lambda path: read_vae(path, None)),
    Reader("tensors", "images/text_encoder_outputs/**/*.safetensors", _read_tensors),
    Reader("latents", "images/*.npz", read_cache),
    Reader("metadata", "meta_*.json", read_metadata),
    Reader("prompts", "prompts.*", read_prompt_file),
    Reader("options", "options.toml", _read_options),
    Reader("progress of a state", "state/progress.json", lambda path: read_progress(path.parent)),
    Reader("images", "images/*.[pjwgbt]*[gfp]", _read_image),
    Reader("captions", "images/*.txt", read_utf8),
)


def read_damaged(reader: Reader, whole: Path, folder: Path, chance: random.Random) -> Reading:
    """Read a damaged copy of one of the reader's files below `whole`; it stays in `folder` if that ends badly."""
    source = chance.choice(sorted(path for path in whole.glob(reader.pattern) if path.is_file()))
    damage = chance.choice(damages_of(source.suffix))
    folder.mkdir(parents=True)
    path = folder / source.name
    path.write_bytes(damage(source.read_bytes(), chance))
    is_refused, fault = False, ""
    started = time.monotonic()
    try:
        with _bounded(), warnings.catch_warnings(action="ignore"):
            reader.read(path)
    except UserError:
        is_refused = True
    except (Exception, _TooSlowError) as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
        fault = f"{type(error).__name__}: {str(error)[:200]} ({_place(error)})"
    seconds = round(time.monotonic() - started, 3)
    if not fault:
        path.unlink()
        folder.rmdir()
    return Reading(reader.name, f"{damage.__name__} {source.name}", is_refused, seconds, fault)


class _TooSlowError(BaseException):
    """Not an `Exception`, so that no guard takes it for a damaged file."""


@contextmanager
def _bounded() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _TooSlowError(f"not done after {MOST_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"
