"""What a run reports while it trains: progress bar, TensorBoard or wandb, sample images."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tqdm import tqdm

from library.config.errors import UserError
from library.config.file_names import name_problem, require_writable_name, text_problem
from library.config.options import option

if TYPE_CHECKING:  # a mistake on the command line is answered before these are imported
    from accelerate import Accelerator
    from PIL import Image

    from library.training.learner import StepReport
    from library.training.plan import Occasion

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""How long a run waits before it writes again to a log that could not be written."""
_TIME_FORMAT = "%Y%m%d%H%M%S"
_TRACKER_NAME = "finetuning"
_NAMES_OF_KOHYA = {"text_encoder_l": "text_encoder1", "text_encoder_g": "text_encoder2"}
"""Curves that users of kohya's trainers look for, beside those by the names of this project."""


@dataclass(frozen=True)
class TrackingOptions:
    """Logs."""

    _argument_group_name: ClassVar[str] = "Logs"

    logging_dir: Path | None = option(None, "Folder for logs. Each run creates a subfolder named by date and time.")
    log_with: str | None = option(
        None,
        "Log to this tracker. --logging_dir alone selects tensorboard.",
        choices=("tensorboard", "wandb", "all", None),
    )
    log_prefix: str | None = option(
        None, "Prefix of the name of the run's log folder. A / in it makes a folder below --logging_dir."
    )
    log_tracker_name: str | None = option(None, "Name of the tracker. Default: finetuning.")
    wandb_run_name: str | None = option(None, "Name of the run in wandb. Other trackers have none.")

    @property
    def trackers(self) -> list[str]:
        """The names of accelerate's trackers."""
        if self.log_with == "all":
            return ["tensorboard", "wandb"]
        if self.log_with is not None:
            return [self.log_with]
        return ["tensorboard"] if self.logging_dir is not None else []

    def run_folder(self, now: datetime) -> Path | None:
        """Return the log folder of a run that starts `now`."""
        return None if self.logging_dir is None else self.logging_dir / f"{self.log_prefix or ''}{now:{_TIME_FORMAT}}"

    @property
    def tracker_name(self) -> str:
        """The name of the tracker, and of its folder in that of the run."""
        return _TRACKER_NAME if self.log_tracker_name is None else self.log_tracker_name

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if "tensorboard" in self.trackers and self.logging_dir is None:
            yield "--log_with tensorboard needs --logging_dir."
        if "wandb" in self.trackers and find_spec("wandb") is None:
            yield "--log_with wandb: the package is not installed; pip install wandb."
        if self.logging_dir is None and self.log_prefix is not None:
            yield "--log_prefix needs --logging_dir."
        if not self.trackers and self.log_tracker_name is not None:
            yield "--log_tracker_name needs --logging_dir or --log_with."
        yield from self._name_problems()

    def heavy_problems(self) -> Iterator[str]:
        """Yield why logs cannot be written under these names: they are tried."""
        folder = self.run_folder(datetime.now())
        if folder is None:
            return
        try:
            require_writable_name(folder.parent, folder.name, "--log_prefix, with the time of the run,")
            require_writable_name(folder, self.tracker_name, "--log_tracker_name")
        except UserError as error:
            yield str(error)

    def _name_problems(self) -> Iterator[str]:
        parts = f"{self.log_prefix or ''}{datetime.now():{_TIME_FORMAT}}".split("/")
        if problem := next(filter(None, map(name_problem, parts)), None):
            yield f"--log_prefix is '{self.log_prefix}': {problem}. Logs are written below --logging_dir."
        if problem := name_problem(self.tracker_name):
            yield f"--log_tracker_name is '{self.log_tracker_name}': {problem}. Choose another name."
        if self.wandb_run_name is not None and (problem := text_problem(self.wandb_run_name)):
            yield f"--wandb_run_name: {problem}. Correct the text."


class Tracker:
    """Shows and logs the progress of a run; silent in all processes but the main one.

    A log that cannot be written (a full disk) does not end the run: it is reported, and tried again after a minute.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        options: TrackingOptions,
        log_folder: Path | None = None,
        *,
        num_steps: int,
        steps_per_epoch: int,
        steps_done: int = 0,
        losses: Sequence[float] = (),
    ):
        """`steps_done` and the last `losses` are those of the resumed run, if there is one.

        `log_folder` None leaves the logs in accelerate's own place.
        """
        self._accelerator = accelerator
        self._options = options
        if log_folder is not None:
            accelerator.project_configuration.logging_dir = str(log_folder)
        self._steps_done = steps_done
        self._log_failed_at: float | None = None
        self._losses = deque(losses, maxlen=steps_per_epoch)
        self._bar = tqdm(
            total=num_steps,
            initial=steps_done,
            desc="steps",
            disable=not accelerator.is_local_main_process,
            smoothing=0.05,
        )
        self._last_time = time.perf_counter()
        if options.trackers:
            self._log(self._open_log)

    @property
    def losses(self) -> list[float]:
        """The losses of the moving average."""
        return list(self._losses)

    def after_step(self, occasion: "Occasion", report: "StepReport | None") -> None:
        """Log an optimizer step; the average is over as many steps as an epoch has, finite losses only."""
        if report is None:  # the run begins
            return
        if math.isfinite(report.loss):
            self._losses.append(report.loss)
        average = sum(self._losses) / max(1, len(self._losses))
        now = time.perf_counter()
        values = {"loss/current": report.loss, "loss/average": average}
        values |= {"steps_per_second": 1 / (now - self._last_time)}
        rates = report.rates.items()
        values |= {f"lr/{part}": rate for part, rate in rates}
        values |= {f"lr/{_NAMES_OF_KOHYA[part]}": rate for part, rate in rates if part in _NAMES_OF_KOHYA}
        if occasion.epoch_ended is not None:
            values["loss/epoch"] = average
        if report.grad_norm is not None:
            values["grad_norm"] = report.grad_norm
        self._last_time = now
        self._steps_done = occasion.step
        self._log(lambda: self._accelerator.log(values, step=occasion.step))
        self._bar.set_postfix(loss=f"{report.loss:.4f}", average=f"{average:.4f}", refresh=False)
        self._bar.update()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Close the progress bar at the end of the block, however it ends."""
        try:
            yield
        finally:
            self._bar.close()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Do not count the time of the block (samples, saves) as training time."""
        started = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - started

    def log_image(self, step: int, name: str, image: "Image.Image", text: str) -> None:
        """Show a sample image and its parameters in the trackers."""
        import numpy

        pixels = numpy.asarray(image)[None]  # (1, H, W, 3)

        def write() -> None:
            for tracker in self._accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **layout)
            self._accelerator.log({f"{name}/text": text.replace("\n", "  \n")}, step=step)

        self._log(write)

    def close(self) -> None:
        """Close the bar and flush the trackers."""
        self._bar.close()
        self._log(self._accelerator.end_training)

    def _open_log(self) -> None:
        # Steps that a killed run logged after its last state are logged again: the curves must not have two branches.
        tensorboard = {"purge_step": self._steps_done + 1} if self._steps_done else {}
        wandb = {"name": self._options.wandb_run_name} if self._options.wandb_run_name else {}
        trackers = {"tensorboard": tensorboard, "wandb": wandb}
        self._accelerator.init_trackers(self._options.tracker_name, init_kwargs=trackers)

    def _log(self, write: Callable[[], None]) -> None:
        """Call `write`. TensorBoard's writer is unusable after its first failure: open another one a minute later."""
        try:
            if self._log_failed_at is not None and time.monotonic() - self._log_failed_at > RETRY_SECONDS:
                self._log_failed_at = None
                self._open_log()
            write()
        except OSError as error:
            log.warning("the log cannot be written (%s); training continues without it", error.strerror or error)
            self._log_failed_at = time.monotonic()
            self._accelerator.trackers = []
