"""When a run draws sample pictures, and where they go."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from PIL.Image import Image

from library.config.atomic_files import CannotWrite
from library.config.errors import UserError
from library.config.options import option
from library.samples.picture_files import (
    PictureRecord,
    grid_name,
    other_drawings,
    parameters_text,
    picture_name,
    save_picture,
)
from library.samples.prompts import SAMPLERS, SamplePrompt, read_prompt_file
from library.samples.sample_grid import SampleGrid, make_sample_grid
from library.samples.sampler import SamplingNetworks, draw_picture
from library.sdxl.sizes import Size
from library.training.tracking import Tracker

SAMPLE_FOLDER = "sample"

Each = TypeVar("Each")


@dataclass(frozen=True)
class SampleOptions:
    """Sample pictures."""

    _argument_group_name: ClassVar[str] = "Sample pictures"

    sample_prompts: Path | None = option(
        None, "File of prompts (.txt, .toml, .json), one picture a line: G prompt --e L prompt --n negative ..."
    )
    sample_every_n_steps: int | None = option(None, "Draw before the first step and after every n optimizer steps.")
    sample_every_n_epochs: int | None = option(None, "Draw before the first step and after every n epochs.")
    sample_at_first: bool = option(False, "Draw before the first step, also where nothing is drawn later.")
    sample_grid: bool = option(
        False,
        "Draw a grid before the first step and after the last: each L prompt of the prompt file (rows; a line without"
        " --e has none) with each G prompt (columns), all with the seed and the other settings of its first line.",
    )
    sample_sampler: str = option("ddim", "Sampler of pictures whose line names none.", choices=SAMPLERS)

    def problems(self) -> Iterator[str]:
        """What cannot work, mistakes in the prompt file among it."""
        is_due = self.draws_each_prompt or self.sample_grid
        if self.sample_prompts is None:
            if is_due:
                yield (
                    "--sample_every_n_steps, --sample_every_n_epochs, --sample_at_first and --sample_grid need"
                    " --sample_prompts."
                )
            return
        if not is_due:
            yield "--sample_prompts: nothing says when to draw; add --sample_every_n_steps=100 or --sample_at_first."
        for flag in ("sample_every_n_steps", "sample_every_n_epochs"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                yield f"--{flag} is {value}; it must be 1 or more."
        if self.sample_every_n_steps and self.sample_every_n_epochs:
            yield "--sample_every_n_steps and --sample_every_n_epochs exclude each other: file names count one of them."
        try:
            self.read_grid()
        except UserError as error:
            yield str(error)

    @property
    def draws_each_prompt(self) -> bool:
        """Whether the pictures of the prompt file are drawn at all, not only the grid."""
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)

    def read_grid(self) -> SampleGrid | None:
        """The grid to draw, if one is; raises `UserError` for prompts that make none, and as `read_prompt_file`."""
        prompts = self.read_prompts()
        return make_sample_grid(prompts) if prompts and self.sample_grid else None

    def read_prompts(self) -> list[SamplePrompt]:
        """The pictures to draw; none without a prompt file."""
        return [] if self.sample_prompts is None else read_prompt_file(self.sample_prompts)


class Sampling:
    """Draws the pictures of the prompt file when they are due, into `output_dir/sample` and the trackers.

    A picture that cannot be drawn or saved is named, and the run goes on. None is begun once `is_stopping` says that
    the run is to stop; what is missing then is drawn when the run goes on. A picture that was drawn before, but not
    before `since`, is that of a run which was killed and has gone back to a state: the new one takes its place.

    A prompt without `--d` gets a seed of its own at every step, made from the run's seed, so that a run can be
    repeated. Training is not touched: every picture has its own generator, and `finished_weights` is a block in which
    the networks have the weights that a saved model would have.
    """

    def __init__(
        self,
        options: SampleOptions,
        prompts: Sequence[SamplePrompt],
        networks: SamplingNetworks,
        tracker: Tracker,
        *,
        output_dir: Path,
        model_name: str | None,
        size: Size,
        seed: int,
        is_stopping: Callable[[], bool] = lambda: False,
        since: datetime | None = None,
        finished_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._options = options
        self._prompts = prompts
        self._networks = networks
        self._tracker = tracker
        self._folder = output_dir / SAMPLE_FOLDER
        self._model_name = model_name
        self._size = size
        self._seed = seed
        self._is_stopping = is_stopping
        self._grid = options.read_grid()
        self._since = since
        self._finished_weights = finished_weights
        shared = [str(prompt.line) for prompt in prompts if prompt.shared]
        if shared:
            tracker.say(f"{options.sample_prompts}: no --e in line {', '.join(shared)}: both encoders read one prompt")

    def at_start(self) -> None:
        """Draw the initial pictures, if any are drawn at all."""
        if self._options.draws_each_prompt:
            self._draw(step=0, epoch=None)
        self._draw_grid(step=0)

    def after_step(self, step: int, *, only_missing: bool = False) -> None:
        """Draw if pictures are due after optimizer step `step` (from 1); `only_missing` draws those not there yet."""
        every = self._options.sample_every_n_steps
        if every is not None and step % every == 0:
            self._draw(step, epoch=None, only_missing=only_missing)

    def after_epoch(self, step: int, epoch: int, *, only_missing: bool = False) -> None:
        """As `after_step`, after epoch `epoch` (from 1), which ended with optimizer step `step`."""
        every = self._options.sample_every_n_epochs
        if every is not None and epoch % every == 0:
            self._draw(step, epoch, only_missing=only_missing)

    def when_due(self, step: int, epoch_ended: int | None, *, only_missing: bool = False) -> None:
        """As `after_step`, and as `after_epoch` where an epoch ended with that step."""
        self.after_step(step, only_missing=only_missing)
        if epoch_ended is not None:
            self.after_epoch(step, epoch_ended, only_missing=only_missing)

    def at_end(self, step: int, epoch_ended: int | None, *, only_missing: bool = False) -> None:
        """As `when_due`, after the last optimizer step; and the last grid."""
        self.when_due(step, epoch_ended, only_missing=only_missing)
        self._draw_grid(step, only_missing=only_missing)

    def _draw(self, step: int, epoch: int | None, *, only_missing: bool = False) -> None:
        prompts = [
            (index, prompt)
            for index, prompt in enumerate(self._prompts)
            if not (only_missing and self._is_there(self._name(prompt, index, step, epoch)))
        ]
        with self._tracker.untimed(), self._finished_weights():
            for index, prompt in self._until_stop(prompts, step):
                self._draw_one(prompt, index, step, epoch)

    def _name(self, prompt: SamplePrompt, index: int, step: int, epoch: int | None) -> str:
        return picture_name(self._model_name, now=datetime.now(), step=step, epoch=epoch, index=index, seed=prompt.seed)

    def _is_there(self, name: str) -> bool:
        """Whether this run, or the one that it goes on with, has drawn that picture."""
        return self._since is not None and bool(other_drawings(self._folder / name, self._since))

    def _until_stop(self, prompts: Sequence[Each], step: int) -> Iterator[Each]:
        for number_drawn, each in enumerate(prompts):
            if self._is_stopping():
                left = len(prompts) - number_drawn
                self._tracker.say(f"step {step}: the run stops, {left} pictures are not drawn")
                return
            yield each

    def _draw_one(self, prompt: SamplePrompt, index: int, step: int, epoch: int | None) -> None:
        record = self._record(prompt, step, self._fresh_seed(step, index))
        image = self._try_to_draw(record, f"prompt {prompt.line}")
        if image is None:
            return
        self._save(self._name(prompt, index, step, epoch), image, record)
        self._tracker.log_picture(step, f"sample/{index:02d}", image, parameters_text(record))

    def _draw_grid(self, step: int, *, only_missing: bool = False) -> None:
        name = grid_name(self._model_name, now=datetime.now(), step=step)
        if self._grid is None or (only_missing and self._is_there(name)):
            return
        seed = self._fresh_seed(step=0, index=0)  # the same before and after, unless the first line gives one
        prompts, num_chunks = self._grid.prompts(), self._grid.num_chunks
        with self._tracker.untimed(), self._finished_weights():
            pictures = [
                self._try_to_draw(
                    self._record(prompt, step, seed),
                    f"L '{prompt.prompt_l}' with G '{prompt.prompt_g}' in the grid",
                    num_chunks,
                )
                for prompt in self._until_stop(prompts, step)
            ]
        if len(pictures) < len(prompts):
            return
        image = self._grid.table(pictures)
        record = self._record(self._grid.first, step, seed)
        self._save(name, image, record, self._grid.texts())
        self._tracker.log_picture(step, "sample/grid", image, parameters_text(record))

    def _record(self, prompt: SamplePrompt, step: int, fresh_seed: int) -> PictureRecord:
        return PictureRecord(
            prompt=prompt,
            sampler=prompt.sampler or self._options.sample_sampler,
            width=prompt.width or self._size.width,
            height=prompt.height or self._size.height,
            seed=fresh_seed if prompt.seed is None else prompt.seed,
            step=step,
            model_name=self._model_name or "",
        )

    def _save(
        self, name: str, image: Image, record: PictureRecord, more_texts: Mapping[str, str] | None = None
    ) -> None:
        try:
            save_picture(self._folder / name, image, record, more_texts)
        except CannotWrite as error:
            self._tracker.say(f"step {record.step}: {error}")
        else:
            for other in () if self._since is None else other_drawings(self._folder / name, self._since):
                other.unlink(missing_ok=True)

    def _try_to_draw(self, record: PictureRecord, which: str, min_chunks: int = 1) -> Image | None:
        """The picture, or None, and then the user is told why; `which` names its prompt."""
        where = f"step {record.step}: the picture of {which}"
        try:
            image = draw_picture(
                self._networks,
                record.prompt,
                sampler=record.sampler,
                width=record.width,
                height=record.height,
                seed=record.seed,
                min_chunks=min_chunks,
            )
        except (torch.OutOfMemoryError, MemoryError):
            size = f"{record.width}x{record.height}"
            self._tracker.say(f"{where} is not drawn: no memory is left for {size}; lower its --w and --h")
            return None
        except RuntimeError as error:  # the CPU's memory, or a kernel's: torch has no name of their own for these
            self._tracker.say(f"{where} is not drawn: {error}")
            return None
        if image is None:
            self._tracker.say(f"{where} is NaN and is not saved (fp16? add --no_half_vae)")
        return image

    def _fresh_seed(self, step: int, index: int) -> int:
        text = f"{self._seed}/{step}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
