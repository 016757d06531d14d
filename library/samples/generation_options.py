"""The flags of sdxl_gen_img.py."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.config.errors import UserError
from library.config.magnitudes import MOST_IMAGES_AT_ONCE
from library.config.options import option
from library.samples.prompts import (
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    SAMPLERS,
    SamplePrompt,
    parse_prompt_line,
    read_prompt_file,
)
from library.samples.sampler_names import sampler_misfits
from library.sdxl.model_source import ModelOptions
from library.sdxl.prediction import SDXL_PREDICTION, Prediction
from library.sdxl.prediction_options import PredictionOptions
from library.sdxl.sizes import PIXELS_PER_LATENT

if TYPE_CHECKING:
    from library.samples.generation import Defaults

_MOST_IMAGES = 100_000


@dataclass(frozen=True)
class DrawnModelOptions:
    """The model that draws."""

    _argument_group_name: ClassVar[str] = "Model"

    ckpt: str | None = option(
        None, "SDXL model: a .safetensors or .ckpt file, a diffusers folder, or a name on the hub."
    )
    vae: str | None = option(None, "Use this VAE instead of the model's: a file or a diffusers folder.")
    mixed_precision: str = option(
        "no",
        "Precision of the computation, as in training: the weights stay as the file holds them, and images equal the "
        "samples of the run that trained them.",
        choices=("no", "fp16", "bf16"),
    )
    sdpa: bool = option(True, "Use torch's scaled_dot_product_attention, which is always on.", choices=(True,))
    bf16: bool = option(False, "Hold and run all networks in bfloat16.")
    fp16: bool = option(False, "Hold and run all networks in float16, on a GPU.")
    no_half_vae: bool = option(False, "Run the VAE in float32 whatever the precision is.")
    v_parameterization: bool = option(
        False, "The model predicts velocity. Needed only for files that do not say so themselves."
    )
    flow_matching: bool = option(
        False, "The model is a rectified flow. Needed only for files that do not say so themselves."
    )
    zero_terminal_snr: bool = option(
        False, "The model was trained with zero terminal SNR. Needed only for files that do not say so themselves."
    )
    flow_shift: float | None = option(
        None,
        "Draw images of a flow with noise levels shifted towards noise by this factor. Default: that of the model.",
        least=0.01,
        most=100,
    )
    legacy_text_projection: bool = option(False, "Compute G's pooled vector with the transposed matrix, as kohya's do.")
    transposed_text_projection: bool = option(False, "Read G's text projection transposed, as OneTrainer stores it.")

    @property
    def source(self) -> ModelOptions:
        """The model in the terms of the trainer."""
        return ModelOptions(
            pretrained_model_name_or_path=self.ckpt,
            vae=self.vae,
            no_half_vae=self.no_half_vae,
            legacy_text_projection=self.legacy_text_projection,
            transposed_text_projection=self.transposed_text_projection,
        )

    @property
    def prediction(self) -> PredictionOptions:
        """What the user says that the model predicts."""
        return PredictionOptions(
            v_parameterization=self.v_parameterization,
            flow_matching=self.flow_matching,
            zero_terminal_snr=self.zero_terminal_snr,
            flow_shift=self.flow_shift,
        )

    @property
    def precision(self) -> str:
        """The precision of the computation."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else self.mixed_precision

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        yield from self.prediction.problems()
        for problem in self.source.problems():
            yield problem.replace("--pretrained_model_name_or_path", "--ckpt").replace("to start from", "to draw with")
        if sum((self.bf16, self.fp16, self.mixed_precision != "no")) > 1:
            yield "--bf16, --fp16 and --mixed_precision exclude each other; keep one of them."

    def heavy_problems(self) -> Iterator[str]:
        """Yield what is wrong on this machine; the GPU is asked through torch."""
        import torch

        if self.precision == "fp16" and not torch.cuda.is_available():
            yield "fp16 needs a GPU; use --bf16 or --mixed_precision=no."


@dataclass(frozen=True)
class ImageOptions:
    """What is drawn; a prompt may override size, steps, guidance, sampler and seed."""

    _argument_group_name: ClassVar[str] = "Images"

    prompt: str | None = option(
        None, "One prompt, as a line of the prompt file: G prompt --e L prompt --n negative ..."
    )
    prompt_file: Path | None = option(
        None, "File of prompts (.txt, .toml, .json), one image per line.", aliases=["--from_file"]
    )
    outdir: Path = option(Path("outputs"), "Folder for the images.")
    images_per_prompt: int = option(1, "Number of images of each prompt.", least=1, most=_MOST_IMAGES)
    batch_size: int = option(
        1, "Number of images drawn at once, of neighbouring prompts.", least=1, most=MOST_IMAGES_AT_ONCE
    )
    W: int = option(1024, "Width in pixels.", least=MIN_SIDE, most=MAX_SIDE)
    H: int = option(1024, "Height in pixels.", least=MIN_SIDE, most=MAX_SIDE)
    steps: int = option(30, "Number of sampling steps.", least=1, most=MAX_STEPS)
    scale: float = option(7.5, "Guidance scale.", least=0, most=1000)
    guidance_rescale: float = option(
        0.0,
        "Rescale guidance towards the contrast of the prediction without it (Lin et al. 2023): 0.7 is common for "
        "models with zero terminal SNR. 0 leaves it as it is.",
        least=0,
        most=1,
    )
    sampler: str = option("ddim", "Sampler.", choices=SAMPLERS)
    seed: int | None = option(
        None,
        "Seed of the first image of each prompt; the next ones have the seeds after it. Default: another each time.",
        least=0,
        most=MAX_SEED,
    )
    sample_grid: bool = option(
        False, "Draw one grid instead: each L prompt (rows) with each G prompt (columns), as the trainer does."
    )
    zeros_l: bool = option(
        False, "Replace an empty negative prompt of L by zeros, for models trained with --dropped_caption=zeros."
    )
    zeros_g: bool = option(
        False, "Replace an empty negative prompt of G by zeros, for models trained with --dropped_caption=zeros."
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of prompts that do not name them."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.scale,
            "guidance_rescale": self.guidance_rescale,
        }

    @property
    def names_prompts(self) -> bool:
        """Whether prompts are given; else they are asked for."""
        return self.prompt is not None or self.prompt_file is not None

    def defaults(self, model_name: str, prediction: Prediction = SDXL_PREDICTION) -> "Defaults":
        """Return what holds for prompts that do not say it."""
        from library.samples.generation import Defaults

        width, height = (side // PIXELS_PER_LATENT * PIXELS_PER_LATENT for side in (self.W, self.H))
        return Defaults(width, height, self.sampler, self.seed, model_name, prediction)

    def prompts(self) -> list[SamplePrompt]:
        """Return the prompts, none if they are asked for. Raise `UserError` for mistakes in them."""
        if self.prompt is not None:
            return [parse_prompt_line(self.prompt, "--prompt", self.settings)]
        return [] if self.prompt_file is None else read_prompt_file(self.prompt_file, self.settings)

    def require_samplers(self, prompts: Iterable[SamplePrompt], kind: str) -> None:
        """Raise `UserError` if a sampler of the prompts cannot draw with a model of this prediction type."""
        for misfit in sampler_misfits([prompt.sampler or self.sampler for prompt in prompts], kind):
            raise UserError(misfit)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.prompt is not None and self.prompt_file is not None:
            yield "--prompt and --prompt_file exclude each other; keep one of them."
        if self.sample_grid and self.prompt_file is None:
            yield "--sample_grid needs --prompt_file: its L prompts are set against its G prompts."
        try:
            self.prompts()
        except UserError as error:
            yield str(error)

    def heavy_problems(self) -> Iterator[str]:
        """Yield what is wrong with the grid; its prompts are counted in tokens."""
        from library.samples.sample_grid import make_sample_grid

        try:
            if self.sample_grid:
                make_sample_grid(self.prompts())
        except UserError as error:
            yield str(error)
