"""What a run reports while it goes: progress bar, TensorBoard or wandb, sample pictures."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from library.config.options import option

RETRY_SECONDS = 60.0
"""How long a log that could not be written is left alone."""


@dataclass(frozen=True)
class TrackingOptions:
    """Logs."""

    _argument_group_name: ClassVar[str] = "Logs"

    logging_dir: Path | None = option(None, "Folder for logs; each run makes a folder in it, named by date and time.")
    log_with: str | None = option(
        None,
        "Where logs go; --logging_dir alone means tensorboard.",
        choices=("tensorboard", "wandb", "all", None),
    )
    log_prefix: str | None = option(None, "What the name of the run's log folder begins with.")
    log_tracker_name: str | None = option(None, "Name of the tracker; finetuning where not given.")

    @property
    def trackers(self) -> list[str]:
        """Names of accelerate's trackers."""
        if self.log_with == "all":
            return ["tensorboard", "wandb"]
        if self.log_with is not None:
            return [self.log_with]
        return ["tensorboard"] if self.logging_dir is not None else []

    def run_folder(self, now: datetime) -> Path | None:
        """The log folder of a run that starts `now`."""
        return None if self.logging_dir is None else self.logging_dir / f"{self.log_prefix or ''}{now:%Y%m%d%H%M%S}"

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if "tensorboard" in self.trackers and self.logging_dir is None:
            yield "--log_with tensorboard needs --logging_dir."
        if "wandb" in self.trackers and find_spec("wandb") is None:
            yield "--log_with wandb: the package is not installed; pip install wandb."
        if self.logging_dir is None and self.log_prefix is not None:
            yield "--log_prefix needs --logging_dir."
        if not self.trackers and self.log_tracker_name is not None:
            yield "--log_tracker_name needs --logging_dir or --log_with."


class Tracker:
    """Shows and logs the course of a run. On other processes than the main one it keeps silent.

    A log that cannot be written (a full disk) does not end the run: that is said, and tried again after a minute.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: TrackingOptions,
        log_folder: Path | None = None,
        *,
        num_steps: int,
        steps_per_epoch: int,
        steps_done: int = 0,
        losses: Sequence[float] = (),
    ):
        """`steps_done` and the last `losses` are those of the run that is resumed, if one is.

        `log_folder` None leaves the logs where accelerate has them.
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

    def log_step(self, step: int, loss: float, rates: Mapping[str, float], grad_norm: float | None) -> None:
        """Log optimizer step `step` (from 1); the average is over as many steps as an epoch has, bad ones left out."""
        if math.isfinite(loss):
            self._losses.append(loss)
        average = sum(self._losses) / max(1, len(self._losses))
        now = time.perf_counter()
        values = {"loss/current": loss, "loss/average": average, "steps_per_second": 1 / (now - self._last_time)}
        values |= {f"lr/{part}": rate for part, rate in rates.items()}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        self._last_time = now
        self._steps_done = step
        self._log(lambda: self._accelerator.log(values, step=step))
        self._bar.set_postfix(loss=f"{loss:.4f}", average=f"{average:.4f}", refresh=False)
        self._bar.update()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Do not count the time of the block as training: samples, saves."""
        started = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - started

    def log_picture(self, step: int, name: str, image: Image.Image, text: str) -> None:
        """Show a sample picture and how it was drawn in the trackers."""
        pixels = np.asarray(image)[None]  # (1, H, W, 3)

        def log() -> None:
            for tracker in self._accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **layout)
            self._accelerator.log({f"{name}/text": text.replace("\n", "  \n")}, step=step)

        self._log(log)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._accelerator.is_local_main_process:
            self._bar.write(message)

    def close(self) -> None:
        """End the bar and flush the trackers."""
        self._bar.close()
        self._log(self._accelerator.end_training)

    def _open_log(self) -> None:
        # What a killed run has logged after its state is logged again, so that the curves have no second branch.
        tensorboard = {"purge_step": self._steps_done + 1} if self._steps_done else {}
        name = self._options.log_tracker_name or "finetuning"
        self._accelerator.init_trackers(name, init_kwargs={"tensorboard": tensorboard})

    def _log(self, write: Callable[[], None]) -> None:
        """`write` to the log, unless that fails; TensorBoard's writer ends with its first failure: open another one."""
        try:
            if self._log_failed_at is not None and time.monotonic() - self._log_failed_at > RETRY_SECONDS:
                self._log_failed_at = None
                self._open_log()
            write()
        except OSError as error:
            self.say(f"the log cannot be written ({error.strerror or error}); the run goes on without it")
            self._log_failed_at = time.monotonic()
            self._accelerator.trackers = []
