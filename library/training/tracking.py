"""What a run reports while it trains: progress bar, TensorBoard or wandb, sample images."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from library.training.event_files import names_at
from library.training.tracking_options import TrackingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from PIL import Image

    from library.training.learner import StepReport
    from library.training.plan import Occasion

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""How long a run waits before it writes again to a log that could not be written."""
_TEXT_TAG = "text_summary"  # what TensorBoard adds to the names of texts
_NAMES_OF_KOHYA = {"text_encoder_l": "text_encoder1", "text_encoder_g": "text_encoder2"}
"""Curves that users of kohya's trainers look for, beside those by the names of this project."""


_GIB = 2**30


class RunFigures:
    """What the summary at the end of a run says of its steps; `seconds` leave out samples and saves."""

    def __init__(self, *, steps_done: int, num_images_before: int):
        self.steps_before = steps_done
        self.num_images_before = num_images_before
        self.started = time.perf_counter()
        self.seconds = 0.0
        self.loss = self.average = math.nan

    def add(self, seconds: float, *, loss: float, average: float) -> None:
        """Note a step."""
        self.seconds += seconds
        self.loss, self.average = loss, average


class WindowMean:
    """The mean of the last `length` numbers, whose sum is kept exactly: a resumed run has the same to the last bit."""

    def __init__(self, length: int, numbers: Sequence[float] = ()):
        self.numbers: deque[float] = deque(maxlen=length)
        self._sum = 0
        for number in numbers:
            self.add(number)

    def add(self, number: float) -> None:
        """Add a finite number; the oldest one leaves where there are more than `length`."""
        if len(self.numbers) == self.numbers.maxlen:
            self._sum -= _in_smallest_units(self.numbers[0])
        self.numbers.append(number)
        self._sum += _in_smallest_units(number)

    def mean(self) -> float:
        """Return the mean, 0 of none."""
        return self._sum / (max(1, len(self.numbers)) << _SMALLEST_UNIT)


_SMALLEST_UNIT = 1074
"""The smallest positive float is 2 to the power of minus this: every float is a whole number of it."""


def _in_smallest_units(number: float) -> int:
    numerator, denominator = number.as_integer_ratio()
    return numerator << _SMALLEST_UNIT - denominator.bit_length() + 1


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
        num_images: int = 0,
        config: Mapping[str, Any] | None = None,
    ):
        """`steps_done`, the last `losses` and the images seen are those of the resumed run, if there is one.

        `log_folder` None leaves the logs in accelerate's own place. `config` are the options to be logged.
        """
        self._accelerator = accelerator
        self._options = options
        if log_folder is not None:
            accelerator.project_configuration.logging_dir = str(log_folder)
        self._steps_done = steps_done
        self._resumed_at = steps_done or None
        self._names_at_resume: frozenset[str] | None = None  # read when it is first asked for
        self._log_failed_at: float | None = None
        self._losses = WindowMean(steps_per_epoch, losses)
        self._bar = tqdm(
            total=num_steps,
            initial=steps_done,
            desc="steps",
            disable=not accelerator.is_local_main_process,
            smoothing=0.05,
        )
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._process = psutil.Process()
        self.num_images = num_images
        self.figures = RunFigures(steps_done=steps_done, num_images_before=num_images)
        self._last_time = time.perf_counter()
        if options.trackers:
            self._log(self._open_log)

    @property
    def losses(self) -> list[float]:
        """The losses of the moving average."""
        return list(self._losses.numbers)

    def after_step(self, occasion: "Occasion", report: "StepReport | None") -> None:
        """Log an optimizer step; the average is over as many steps as an epoch has, finite losses only."""
        if report is None:  # the run begins
            return
        if math.isfinite(report.loss):
            self._losses.add(report.loss)
        average = self._losses.mean()
        now = time.perf_counter()
        seconds = now - self._last_time
        self.num_images += report.num_images
        self.figures.add(seconds, loss=report.loss, average=average)
        values: dict[str, float] = {"loss/current": report.loss, "loss/average": average}
        values |= {"steps_per_second": 1 / seconds, "images_per_second": report.num_images / seconds}
        values |= {"epoch": occasion.step / self._steps_per_epoch, "images_seen": self.num_images}
        values |= self._memory()
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

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        self._log(lambda: self._accelerator.log(dict(values), step=step))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Close the progress bar at the end of the block, however it ends."""
        try:
            yield
        finally:
            self._bar.close()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Do not count the time of the block (samples, saves) as training time, nor let the bar's rate fall by it."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self._last_time += spent
        if not self._bar.disable:
            self._bar.last_print_t += spent

    def log_image(self, step: int, name: str, image: "Image.Image", text: str) -> None:
        """Show a sample image and its parameters in the trackers, unless the run was resumed and has shown them."""
        import numpy

        pixels = numpy.asarray(image)[None]  # (1, H, W, 3)
        text_name = f"{name}/text"

        def write() -> None:
            for tracker in self._accelerator.trackers:
                shown = self._shown_before(tracker, step)
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if name not in shown:
                    tracker.log_images({name: pixels}, step=step, **layout)
                if f"{text_name}/{_TEXT_TAG}" not in shown:
                    tracker.log({text_name: text.replace("\n", "  \n")}, step=step)  # flushes both

        self._log(write)

    def _shown_before(self, tracker: "GeneralTracker", step: int) -> frozenset[str]:
        """Return what the log of a run that was resumed at this step holds of it; wandb begins another one."""
        if tracker.name != "tensorboard" or step != self._resumed_at:
            return frozenset()
        if self._names_at_resume is None:
            self._names_at_resume = names_at(Path(tracker.logging_dir), step)
        return self._names_at_resume

    def close(self) -> None:
        """Close the bar and flush the trackers."""
        self._bar.close()
        self._log(self._accelerator.end_training)

    def _memory(self) -> dict[str, float]:
        """Return the memory in use, in GiB: of this process, and the most that its GPU has held."""
        values = {"memory/host_gib": self._process.memory_info().rss / _GIB}
        if torch.cuda.is_available():
            values["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        return values

    def _open_log(self) -> None:
        # Steps that a killed run logged after its last state are logged again: the curves must not have two branches.
        settings = self._options.tracker_settings()
        if self._steps_done:
            settings["tensorboard"] = {**settings.get("tensorboard", {}), "purge_step": self._steps_done + 1}
        if self._options.wandb_api_key is not None:
            os.environ["WANDB_API_KEY"] = self._options.wandb_api_key
        config = None if self._config is None else dict(self._config)
        self._accelerator.init_trackers(self._options.tracker_name, config=config, init_kwargs=settings)

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
