"""Draw sample images when they are due, into the output folder and the trackers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Image

from library.config.atomic_files import CannotWrite
from library.config.digests import digest
from library.optim.ema_options import EMA
from library.samples.drawing import try_to_draw
from library.samples.options import SampleOptions
from library.samples.picture_files import (
    SAMPLE_FOLDER,
    PictureRecord,
    grid_name,
    other_drawings,
    parameters_text,
    picture_name,
    read_picture,
    save_picture,
)
from library.samples.prompts import SamplePrompt
from library.samples.sampler import SamplingNetworks
from library.sdxl.sizes import Size
from library.training.plan import Occasion
from library.training.saves import AVERAGE_MARK, average_name, last_name
from library.training.tracking import Tracker

log = logging.getLogger(__name__)

_AS_SAID = {"": "", AVERAGE_MARK: " with the averaged weights"}

Each = TypeVar("Each")


@dataclass(frozen=True)
class SampledRun:
    """The run that is sampled: where its images go, how they are called and seeded, and when it began."""

    output_dir: Path
    model_name: str | None
    size: Size
    seed: int
    since: datetime | None = None


class Sampling:
    """Draws the images of the prompt file when they are due, into `output_dir/sample` and the trackers.

    An image that cannot be drawn or saved is named, and the run continues. None is begun once `is_stopping` is true; a
    resumed run draws what is missing. An image that was drawn before, but not before `run.since`, belongs to a run that
    was killed and went back to a state: the new one replaces it.

    A prompt without `--d` gets another seed at every step, derived from the run's seed, so that a run can be repeated.
    Training is not touched: every image has its own generator, and within `weight_sets[""]()` the networks have the
    weights that a saved model would have, within `weight_sets["ema"]()` their moving average. Every process calls the
    event; within `one_writer()` one of them draws. With `from_main`, which returns in all of them what a function does
    in that one, weights are shared: all draw together, and that one saves; `is_stopping` is the same in all then.
    """

    def __init__(
        self,
        options: SampleOptions,
        networks: SamplingNetworks,
        tracker: Tracker,
        run: SampledRun,
        *,
        is_stopping: Callable[[], bool] = lambda: False,
        weight_sets: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
        one_writer: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True),
        from_main: Callable[[Callable[[], Any]], Any] | None = None,
    ):
        self._options = options
        self._prompts = options.read_prompts()
        self._grid = options.read_grid()
        self._networks = networks
        self._tracker = tracker
        self._run = run
        self._folder = run.output_dir / SAMPLE_FOLDER
        self._is_stopping = is_stopping
        sets = weight_sets or {"": nullcontext}
        # What is drawn with, by the mark that it leaves in file names.
        self._sets = {"": sets[""]} | ({AVERAGE_MARK: sets[EMA]} if options.sample_ema else {})
        self._one_writer = one_writer
        self._draw_together = from_main is not None
        self._from_main = from_main or (lambda make: make())
        self._writes = True
        self._says_what_grid_is_left = self._grid is not None
        shared = [str(prompt.line) for prompt in self._prompts if prompt.shared]
        if shared:
            log.info("%s: no --e in line %s: both encoders read one prompt", options.sample_prompts, ", ".join(shared))

    def after_step(self, occasion: Occasion, report: object = None) -> None:
        """Draw what is due on this occasion; if the run was resumed there, only what is missing."""
        draws_prompts = self._prompts_are_due(occasion)
        draws_grid = self._grid is not None and (occasion.step == 0 or occasion.is_last)
        self._say_what_grid_is_left(occasion)
        if not draws_prompts and not draws_grid:
            return
        with self._one_writer() as writes:
            if not (writes or self._draw_together):
                return
            self._writes = writes
            epoch = occasion.epoch_ended if self._options.sample_every_n_epochs and occasion.step > 0 else None
            # Before the first step the average is what the model is.
            for mark in self._sets if occasion.step > 0 else ("",):
                if draws_prompts:
                    self._draw(occasion.step, epoch, mark, only_missing=occasion.is_resumed)
                if draws_grid:
                    self._draw_grid(occasion.step, mark, only_missing=occasion.is_resumed)

    def _prompts_are_due(self, occasion: Occasion) -> bool:
        if occasion.step == 0:
            return self._options.draws_each_prompt
        every_step, every_epoch = self._options.sample_every_n_steps, self._options.sample_every_n_epochs
        by_step = every_step is not None and occasion.step % every_step == 0
        epoch = occasion.epoch_ended
        return by_step or (every_epoch is not None and epoch is not None and epoch % every_epoch == 0)

    def _draw(self, step: int, epoch: int | None, mark: str, *, only_missing: bool) -> None:
        names = [self._name(prompt, index, step, epoch, mark) for index, prompt in enumerate(self._prompts)]
        there = self._from_main(
            lambda: [
                only_missing and self._is_shown_from_file(name, step, _curve(index, mark))
                for index, name in enumerate(names)
            ]
        )
        prompts = [each for each, is_there in zip(enumerate(self._prompts), there, strict=True) if not is_there]
        with self._tracker.untimed(), self._sets[mark]():
            for number, (index, prompt) in enumerate(self._until_stop(prompts, step), start=1):
                log.info("step %d: drawing sample %d of %d%s", step, number, len(prompts), _AS_SAID[mark])
                self._draw_one(prompt, index, step, epoch, mark)

    def _name(self, prompt: SamplePrompt, index: int, step: int, epoch: int | None, mark: str) -> str:
        return picture_name(
            self._run.model_name, now=datetime.now(), step=step, epoch=epoch, index=index, seed=prompt.seed, mark=mark
        )

    def _drawn_before(self, name: str) -> list[Path]:
        """Return the files of that image that this run, or the one it continues, has drawn."""
        return [] if self._run.since is None else other_drawings(self._folder / name, self._run.since)

    def _is_shown_from_file(self, name: str, step: int, curve: str) -> bool:
        """Return whether that image was drawn before; a kill may have come before it was in the log."""
        files = self._drawn_before(name)
        if not files:
            return False
        try:
            image, text = read_picture(max(files))
        except OSError as error:  # somebody else has changed it
            log.warning("'%s' cannot be read and is drawn again: %s", max(files), error)
            return False
        self._tracker.log_image(step, curve, image, text)
        return True

    def _until_stop(self, prompts: Sequence[Each], step: int) -> Iterator[Each]:
        for number_drawn, each in enumerate(prompts):
            if self._is_stopping():
                left = len(prompts) - number_drawn
                log.info("step %d: the run stops, %d images are not drawn", step, left)
                return
            yield each

    def _draw_one(self, prompt: SamplePrompt, index: int, step: int, epoch: int | None, mark: str) -> None:
        record = self._record(prompt, step, self._fresh_seed(step, index), mark)
        image = try_to_draw(self._networks, record, _where(step, f"prompt {prompt.line}"))
        if image is None:
            return
        self._save(step, self._name(prompt, index, step, epoch, mark), _curve(index, mark), image, record)

    def _draw_grid(self, step: int, mark: str, *, only_missing: bool) -> None:
        name = grid_name(self._run.model_name, now=datetime.now(), step=step, mark=mark)
        curve = f"{SAMPLE_FOLDER}{mark}/grid"
        is_there = self._from_main(lambda: only_missing and self._is_shown_from_file(name, step, curve))
        if self._grid is None or is_there:
            return
        seed = self._fresh_seed(step=0, index=0)  # the same before and after, unless the first line sets one
        prompts, num_chunks = self._grid.prompts(), self._grid.num_chunks
        log.info("step %d: drawing the grid of %d images%s", step, len(prompts), _AS_SAID[mark])
        with self._tracker.untimed(), self._sets[mark]():
            pictures = [
                try_to_draw(
                    self._networks,
                    self._record(prompt, step, seed, mark),
                    _where(step, f"L '{prompt.prompt_l}' with G '{prompt.prompt_g}' in the grid"),
                    num_chunks,
                )
                for prompt in self._until_stop(prompts, step)
            ]
        if len(pictures) < len(prompts):  # a stop: a grid is not saved half empty
            return
        image = self._grid.table(pictures)
        record = self._record(self._grid.first, step, seed, mark)
        self._save(step, name, curve, image, record, self._grid.texts())

    def _say_what_grid_is_left(self, occasion: Occasion) -> None:
        """Tell the user of a resumed run, once, that the grid from before the first step is missing."""
        if not self._says_what_grid_is_left or not occasion.is_resumed or occasion.step == 0:
            return
        self._says_what_grid_is_left = False
        if not self._drawn_before(grid_name(self._run.model_name, now=datetime.now(), step=0)):
            log.info("--sample_grid: there is no grid from before the first step; one is drawn after the last alone")

    def _record(self, prompt: SamplePrompt, step: int, fresh_seed: int, mark: str) -> PictureRecord:
        name = self._run.model_name or ""
        return PictureRecord(
            prompt=prompt,
            sampler=prompt.sampler or self._options.sample_sampler,
            width=prompt.width or self._run.size.width,
            height=prompt.height or self._run.size.height,
            seed=fresh_seed if prompt.seed is None else prompt.seed,
            step=step,
            model_name=average_name(last_name(name)) if mark else name,
            prediction=self._networks.prediction,
        )

    def _save(
        self,
        step: int,
        name: str,
        curve: str,
        image: Image,
        record: PictureRecord,
        more_texts: Mapping[str, str] | None = None,
    ) -> None:
        """Save an image and show it in the trackers."""
        if not self._writes:
            return
        try:
            save_picture(self._folder / name, image, record, more_texts)
        except CannotWrite as error:
            log.warning("step %d: %s", step, error)
        else:
            for other in self._drawn_before(name):
                other.unlink(missing_ok=True)
        self._tracker.log_image(step, curve, image, parameters_text(record))

    def _fresh_seed(self, step: int, index: int) -> int:
        text = f"{self._run.seed}/{step}/{index}"
        return int.from_bytes(digest([text.encode()], 4), "little")


def _where(step: int, which: str) -> str:
    return f"step {step}: the image of {which}"


def _curve(index: int, mark: str) -> str:
    """Return the name under which trackers show the images of a prompt."""
    return f"{SAMPLE_FOLDER}{mark}/{index:02d}"
