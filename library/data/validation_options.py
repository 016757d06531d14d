"""Images that are not trained, and when the loss on them is measured: the flags."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from library.config.errors import listed
from library.config.magnitudes import MOST_SEED, MOST_STEPS
from library.config.options import option
from library.sdxl.prediction import SDXL_PREDICTION

_NUM_BANDS = 10
_HIGHEST_TIMESTEP = SDXL_PREDICTION.num_timesteps - 1
_ABOUT_THE_SPLIT = ("validation_split", "validation_seed")


@dataclass(frozen=True)
class ValidationOptions:
    """The loss on images that are not trained."""

    _argument_group_name: ClassVar[str] = "Validation"

    validation_split: float = option(
        0.0,
        "Hold out about this fraction of the images, 0-1, and measure the loss on them. A hash of its key decides for "
        "each image, so that adding images moves none. A data set file can set it for each folder.",
        least=0,
        most=1,
    )
    validation_seed: int = option(
        0, "Seed of which images are held out, and of the noise in validation.", least=0, most=MOST_SEED
    )
    validate_every_n_steps: int | None = option(
        None, "Validate after every n optimizer steps.", least=1, most=MOST_STEPS
    )
    validate_every_n_epochs: int | None = option(
        None,
        "Validate after every n epochs. Default: after each one, unless --validate_every_n_steps is set. The end of a "
        "run is always validated.",
        least=1,
        most=MOST_STEPS,
    )
    validate_at_first: bool = option(
        False, "Validate before the first step as well. With --max_train_steps=0 that is all: a model is measured."
    )
    max_validation_steps: int | None = option(
        None, "Use only the first n batches of the images that are held out.", least=1, most=MOST_STEPS
    )
    validation_timesteps: list[int] = option(
        [],
        "Timesteps at which the loss is measured. Default: the middles of ten equal parts of the trained range: 50, "
        "150, ... 950.",
    )
    validation_ablation: bool = option(
        False,
        "Also measure the loss without the caption of L, of G and of both, with those of another image, with the two "
        "exchanged, and without the pooled vector: what each encoder is worth. Eight times the time.",
    )

    @property
    def needs_images(self) -> list[str]:
        """The flags that were given and have no effect unless images are held out."""
        return [
            f"--{field.name}"
            for field in fields(self)
            if field.name not in _ABOUT_THE_SPLIT and getattr(self, field.name) not in (field.default, [])
        ]

    def timesteps(self, trained: range) -> tuple[int, ...]:
        """Return the timesteps of validation, ascending: by default the middles of ten equal parts of `trained`."""
        if self.validation_timesteps:
            return tuple(sorted(self.validation_timesteps))
        middles = (trained.start + int((band + 0.5) * len(trained) / _NUM_BANDS) for band in range(_NUM_BANDS))
        return tuple(dict.fromkeys(middles))

    def is_due(self, step: int, epoch_ended: int | None, *, is_last: bool) -> bool:
        """Return whether a run is validated after `step`, with which `epoch_ended` (from 1), if one did."""
        if step == 0:
            return self.validate_at_first
        every_step, every_epoch = self.validate_every_n_steps, self.validate_every_n_epochs
        if every_step is None and every_epoch is None:
            every_epoch = 1
        by_step = every_step is not None and step % every_step == 0
        by_epoch = every_epoch is not None and epoch_ended is not None and epoch_ended % every_epoch == 0
        return is_last or by_step or by_epoch

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        timesteps = self.validation_timesteps
        wrong = [str(timestep) for timestep in timesteps if not 0 <= timestep <= _HIGHEST_TIMESTEP]
        if wrong:
            yield f"--validation_timesteps has {listed(wrong)}; it must be from 0 to {_HIGHEST_TIMESTEP}."
        if len(set(timesteps)) < len(timesteps):
            yield "--validation_timesteps has a timestep twice; name each once."

    def conflicts(self, *, has_dataset_config: bool, only_measures: bool, resumes: bool) -> Iterator[str]:
        """Yield what is wrong between these values and other options, one sentence each."""
        flags = self.needs_images
        if flags and not self.validation_split and not has_dataset_config:
            yield f"{' and '.join(flags)}: no images are held out; set --validation_split, such as 0.1."
        if only_measures and not self.validate_at_first:
            yield (
                "--max_train_steps is 0: there is nothing to do. Set the number of steps, add --validate_at_first to "
                "measure the model, or --dry_run to look at the training set."
            )
        if only_measures and resumes:
            yield (
                "--max_train_steps=0 measures a model and takes no step from a state: leave out --resume, and pass the "
                "model that was saved with the state as --pretrained_model_name_or_path."
            )
