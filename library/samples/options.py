"""The flags of sample images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.config.errors import UserError
from library.config.magnitudes import MOST_STEPS
from library.config.options import option
from library.samples.prompts import SAMPLERS, SamplePrompt, read_prompt_file
from library.samples.sampler_names import sampler_misfits

if TYPE_CHECKING:
    from library.samples.sample_grid import SampleGrid


@dataclass(frozen=True)
class SampleOptions:
    """Sample images."""

    _argument_group_name: ClassVar[str] = "Sample images"

    sample_prompts: Path | None = option(
        None, "File of prompts (.txt, .toml, .json), one image per line: G prompt --e L prompt --n negative prompt ..."
    )
    sample_every_n_steps: int | None = option(
        None, "Draw samples before the first step and after every n optimizer steps.", least=1, most=MOST_STEPS
    )
    sample_every_n_epochs: int | None = option(
        None, "Draw samples before the first step and after every n epochs.", least=1, most=MOST_STEPS
    )
    sample_at_first: bool = option(False, "Draw samples before the first step even if none are drawn later.")
    sample_grid: bool = option(
        False,
        "Draw a grid before the first step and after the last: each L prompt of the prompt file (rows; a line without"
        " --e has none) with each G prompt (columns), all with the seed and the other settings of the first line.",
    )
    sample_ema: bool = option(
        False, "Draw each sample with the moving average of --ema as well; the names of these images end in _ema."
    )
    sample_sampler: str = option("ddim", "Sampler for lines of the prompt file that name none.", choices=SAMPLERS)
    sample_guidance_rescale: float = option(
        0.0,
        "Rescale guidance towards the contrast of the prediction without it, for lines that name no --gr (Lin et al. "
        "2023): 0.7 is common for models with zero terminal SNR. 0 leaves it as it is.",
        least=0,
        most=1,
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values and in the prompt file, one sentence each."""
        is_due = self.draws_each_prompt or self.sample_grid
        if self.sample_ema and self.sample_prompts is None:
            yield "--sample_ema needs --sample_prompts."
        if self.sample_prompts is None:
            if is_due:
                yield (
                    "--sample_every_n_steps, --sample_every_n_epochs, --sample_at_first and --sample_grid need"
                    " --sample_prompts."
                )
            return
        if not is_due:
            yield "--sample_prompts: nothing says when to draw; add --sample_every_n_steps=100 or --sample_at_first."
        if self.sample_every_n_steps and self.sample_every_n_epochs:
            yield "--sample_every_n_steps and --sample_every_n_epochs exclude each other: file names count one of them."
        try:
            self.read_prompts()
        except UserError as error:
            yield str(error)

    def misfits(self, kind: str) -> Iterator[str]:
        """Yield the samplers that cannot draw with models of this prediction type, in one sentence."""
        if self.sample_prompts is None:
            return
        yield from sampler_misfits([prompt.sampler or self.sample_sampler for prompt in self.read_prompts()], kind)

    def heavy_problems(self) -> Iterator[str]:
        """Yield what is wrong with the grid; its prompts are counted in tokens."""
        try:
            self.read_grid()
        except UserError as error:
            yield str(error)

    @property
    def draws_each_prompt(self) -> bool:
        """Whether the images of the prompt file are drawn at all, not only the grid."""
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)

    def read_grid(self) -> "SampleGrid | None":
        """Return the grid to draw, if any. Raise `UserError` for prompts without one, and as `read_prompt_file`."""
        from library.samples.sample_grid import make_sample_grid

        prompts = self.read_prompts()
        return make_sample_grid(prompts) if prompts and self.sample_grid else None

    def read_prompts(self) -> list[SamplePrompt]:
        """Return the images to draw; none without a prompt file."""
        if self.sample_prompts is None:
            return []
        return read_prompt_file(self.sample_prompts, {"guidance_rescale": self.sample_guidance_rescale})
