"""All options of a training run, class by class, and what cannot work between them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.captions.draws import Encoder
from library.captions.options import CaptionOptions
from library.config.console_options import ConsoleOptions
from library.config.errors import UserError
from library.config.magnitudes import MOST_BATCHES, MOST_SEED, MOST_STEPS, MOST_VISITS
from library.config.options import ConfigFileOptions, option, problems_of
from library.data.dataset_config import read_dataset_config, require_masks
from library.data.flag_subsets import subsets_of_flags
from library.data.loader_options import LoaderOptions
from library.data.subsets import Subset
from library.data.training_set_options import TrainingSetOptions
from library.data.validation_options import ValidationOptions
from library.diffusion.loss_options import LossOptions
from library.diffusion.options import NoiseOptions, TimestepOptions
from library.images.buckets import BucketOptions, BucketRule, parse_resolution
from library.optim.ema_options import EmaOptions
from library.optim.option_conflicts import average_conflicts, optimizer_conflicts, schedule_refusals
from library.optim.options import OptimizerOptions
from library.optim.schedule_options import ScheduleOptions
from library.samples.options import SampleOptions
from library.sdxl.model_source import ModelOptions
from library.sdxl.model_spec import ModelSpecOptions
from library.sdxl.prediction_options import PredictionOptions
from library.sdxl.sizes import Size
from library.training.compile_options import CompileOptions
from library.training.graph_conflicts import graph_conflicts
from library.training.hub_options import HubOptions
from library.training.precision import PrecisionOptions
from library.training.process_options import ProcessOptions, launch_problems, sharding_problems
from library.training.resume import ResumeOptions
from library.training.saves import SaveOptions, source_conflicts
from library.training.tracking_options import TrackingOptions

if TYPE_CHECKING:  # a mistake on the command line is answered before torch is imported
    from library.sdxl.checkpoint_file import ModelDtypes


@dataclass(frozen=True)
class RunOptions:
    """How long a run trains, and what."""

    _argument_group_name: ClassVar[str] = "Run"

    max_train_steps: int = option(
        1600,
        "Number of optimizer steps. 0 only measures the model, with --validate_at_first.",
        least=0,
        most=MOST_STEPS,
    )
    max_train_epochs: int | None = option(
        None, "Number of epochs; overrides --max_train_steps.", least=1, most=MOST_STEPS
    )
    gradient_accumulation_steps: int = option(
        1,
        "Accumulate the gradients of this many micro-batches before each optimizer step.",
        least=1,
        most=MOST_BATCHES,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: much less memory, slower."
    )
    train_text_encoder: bool = option(False, "Train the text encoders as well.")
    stop_training_te1: float | None = option(
        None, "Freeze text encoder L after so many steps; below 1, that fraction of all.", least=0, most=MOST_STEPS
    )
    stop_training_te2: float | None = option(
        None, "Freeze text encoder G after so many steps; below 1, that fraction of all.", least=0, most=MOST_STEPS
    )
    max_bad_steps: int = option(
        1, "Stop after so many consecutive steps whose loss is NaN or Inf; they are skipped.", least=1, most=MOST_STEPS
    )
    seed: int | None = option(
        None, "Seed of everything random. Default: drawn at random and reported.", least=0, most=MOST_SEED
    )
    dry_run: int | None = option(
        None,
        "Train nothing: show what this many images would be trained as in the first three epochs, and the totals of "
        "the set.",
        bare=12,
        least=1,
        most=MOST_VISITS,
        aliases=["--debug_dataset"],
    )
    dry_run_report: Path | None = option(
        None, "Write the dry run to this file: .html shows the images on a page, .jsonl has a line for every image."
    )
    sdpa: bool = option(True, "Use torch's scaled_dot_product_attention, which is always on.", choices=(True,))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.dry_run_report is not None and self.dry_run is None:
            yield "--dry_run_report needs --dry_run; add it."
        if self.dry_run_report is not None and self.dry_run_report.suffix.lower() not in (".html", ".htm", ".jsonl"):
            yield f"--dry_run_report is '{self.dry_run_report}'; its name must end in .html or .jsonl."
        for flag in ("stop_training_te1", "stop_training_te2"):
            value = getattr(self, flag)
            if value == 0:
                yield f"--{flag} is 0; it must be a number of steps, or a fraction of all steps, above 0."


@dataclass(frozen=True)
class TrainingOptions:
    """All options of sdxl_train.py. Functions receive the classes they read, never the whole."""

    model: ModelOptions
    prediction: PredictionOptions
    training_set: TrainingSetOptions
    buckets: BucketOptions
    captions: CaptionOptions
    loader: LoaderOptions
    run: RunOptions
    processes: ProcessOptions
    precision: PrecisionOptions
    compilation: CompileOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    noise: NoiseOptions
    timesteps: TimestepOptions
    loss: LossOptions
    validation: ValidationOptions
    save: SaveOptions
    resume: ResumeOptions
    model_spec: ModelSpecOptions
    sample: SampleOptions
    tracking: TrackingOptions
    hub: HubOptions
    console: ConsoleOptions
    config_file: ConfigFileOptions

    @property
    def output_dir(self) -> Path:
        """The folder for models and sample images."""
        assert self.save.output_dir is not None  # checked by problems()
        return self.save.output_dir

    @property
    def trains_l(self) -> bool:
        """Whether text encoder L is trained."""
        return self.run.train_text_encoder and self._text_rate(self.optimizer.learning_rate_te1) != 0

    @property
    def trains_g(self) -> bool:
        """Whether text encoder G is trained."""
        return self.run.train_text_encoder and self._text_rate(self.optimizer.learning_rate_te2) != 0

    def _text_rate(self, rate: float | None) -> float:
        return self.optimizer.learning_rate if rate is None else rate

    def freeze_after(self, num_steps: int) -> dict[str, int]:
        """Return the last step, of `num_steps`, that trains each text encoder which is not trained to the end."""
        last = {"text_encoder_l": self.run.stop_training_te1, "text_encoder_g": self.run.stop_training_te2}
        return {name: int(at * num_steps if at < 1 else at) for name, at in last.items() if at is not None}

    @property
    def model_dtypes(self) -> "ModelDtypes":
        """The precision in which each part of the model is held."""
        return self.precision.model_dtypes(
            trains_l=self.trains_l, trains_g=self.trains_g, float32_vae=self.model.no_half_vae
        )

    @property
    def resolution(self) -> Size:
        """The training resolution."""
        return parse_resolution(self.training_set.resolution)

    @property
    def bucket_rule(self) -> BucketRule:
        """The buckets of images without prepared latents. Raise `UserError` for limits that contradict each other."""
        return self.buckets.rule(self.resolution, enabled=self.training_set.enable_bucket)

    def subsets(self) -> list[Subset]:
        """Return what is trained on. Raise `UserError` for files and data sets that cannot work."""
        if self.training_set.dataset_config is not None:
            options = self.training_set, self.loader, self.captions, self.buckets, self.validation
            return require_masks(self.training_set, read_dataset_config(self.training_set.dataset_config, *options))
        flags = self.training_set, self.loader, self.captions, self.bucket_rule
        split, seed = self.validation.validation_split, self.validation.validation_seed
        return [replace(each, validation_split=split, validation_seed=seed) for each in subsets_of_flags(*flags)]

    @property
    def only_measures(self) -> bool:
        """Whether the run has no steps."""
        return self.run.max_train_epochs is None and self.run.max_train_steps == 0

    @property
    def trains_unet(self) -> bool:
        """Whether the U-Net is trained."""
        return self.optimizer.learning_rate != 0

    @property
    def trained_encoders(self) -> list[Encoder]:
        """The text encoders that are trained."""
        trained: dict[Encoder, bool] = {"l": self.trains_l, "g": self.trains_g}
        return [encoder for encoder, is_trained in trained.items() if is_trained]

    def conflicts(self) -> Iterator[str]:
        """Yield what is wrong between classes, one sentence each."""
        for flag, is_trained in (("stop_training_te1", self.trains_l), ("stop_training_te2", self.trains_g)):
            if getattr(self.run, flag) is not None and not is_trained:
                yield f"--{flag} has no effect on an encoder that is not trained; add --train_text_encoder."
        for flag in ("learning_rate_te1", "learning_rate_te2"):
            if getattr(self.optimizer, flag) is not None and not self.run.train_text_encoder:
                yield f"--{flag} has no effect without --train_text_encoder; add it or leave the rate out."
        for flag in ("plot_schedule", "update_captions") if self.run.dry_run is not None else ():
            if getattr(self.schedule, flag, None) or getattr(self.training_set, flag, False):
                yield f"--dry_run shows the set as it is and changes nothing, so it excludes --{flag}; leave one out."
        if not (self.optimizer.learning_rate or self.trains_l or self.trains_g):
            yield "every learning rate is 0: there is nothing to train. Set --learning_rate, such as 1e-5."
        if self.training_set.caches_texts and self.trains_l and self.trains_g:
            yield (
                "--cache_text_encoder_outputs: both text encoders are trained, so their outputs change in every step; "
                "leave it off, or freeze one of them with --learning_rate_te1=0 (L) or --learning_rate_te2=0 (G)."
            )
        sources = {name: getattr(self.model, name) for name in ("pretrained_model_name_or_path", "vae")}
        yield from source_conflicts(self.save, sources, has_average=self.ema.ema, is_measured=self.only_measures)
        if self.prediction.kind is not None:
            yield from self.misfits(self.prediction.kind)
        yield from self.validation.conflicts(
            has_dataset_config=self.training_set.dataset_config is not None,
            only_measures=self.only_measures,
            resumes=self.resume.resume is not None,
        )
        yield from self._bucket_conflicts()
        yield from self.hub.conflicts(self.resume.resume, has_states=self.save.has_states)
        yield from launch_problems(os.environ, self.precision.mixed_precision)
        yield from sharding_problems(os.environ, self._not_sharded, checkpoints=self.run.gradient_checkpointing)
        yield from self._fused_conflicts()
        yield from graph_conflicts(self)
        yield from optimizer_conflicts(self.optimizer, self.schedule, self._known_num_steps)
        yield from average_conflicts(self.ema, self.optimizer, draws_average=self.sample.sample_ema)

    def misfits(self, kind: str) -> Iterator[str]:
        """Yield what does not fit a model of this prediction type, one sentence each."""
        yield from self.loss.misfits(kind)
        yield from self.sample.misfits(kind)

    def heavy_conflicts(self) -> Iterator[str]:
        """Yield what a schedule by its class cannot do with this optimizer; it is tried on a few numbers."""
        yield from schedule_refusals(self.optimizer, self.schedule, self._known_num_steps)

    @property
    def _not_sharded(self) -> dict[str, str]:
        """The flags that are set and do not work with sharded weights, with the reason."""
        reasons = {
            "--mixed_precision=fp16": (self.precision.mixed_precision == "fp16", "a step is skipped by each GPU alone"),
            "--torch_compile": (self.compilation.torch_compile, "weights are gathered between compiled regions"),
        }
        return {flag: reason for flag, (is_set, reason) in reasons.items() if is_set}

    @property
    def _known_num_steps(self) -> int | None:
        """The optimizer steps of the run; None where epochs decide, or it has none: then no schedule can be wrong."""
        steps = self.run.max_train_steps
        return steps if self.run.max_train_epochs is None and steps > 0 else None

    def _fused_conflicts(self) -> Iterator[str]:
        fused, offloaded = self.optimizer.fused_backward_pass, self.optimizer.offload_optimizer
        if fused and self.run.gradient_accumulation_steps > 1:
            yield (
                "--fused_backward_pass steps after every batch and cannot accumulate gradients over "
                f"{self.run.gradient_accumulation_steps} of them; set --gradient_accumulation_steps=1 and a larger "
                "--train_batch_size, or leave out --fused_backward_pass."
            )
        for flag, is_on in (("--fused_backward_pass", fused), ("--offload_optimizer", offloaded)):
            if is_on and self.precision.mixed_precision == "fp16":
                yield (
                    f"{flag} cannot work with --mixed_precision=fp16, whose steps wait until no gradient has "
                    "overflowed; use bf16."
                )

    def _bucket_conflicts(self) -> Iterator[str]:
        try:
            size = self.resolution
        except UserError:
            return  # the class that declares --resolution says so
        if problems_of(self.buckets):
            return  # that class says so, too
        try:
            self.buckets.rule(size, enabled=self.training_set.enable_bucket)
        except UserError as error:
            yield str(error)


OPTION_CLASSES: list[type] = [field.type for field in fields(TrainingOptions) if isinstance(field.type, type)]
