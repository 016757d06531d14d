"""After training: build the model of any EMA length from the snapshots of a run."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.config.environment import torch_environment

os.environ.update(torch_environment())  # read by torch when it is imported

from library.config.errors import UserError, exits_on_user_error
from library.config.magnitudes import MOST_STEPS
from library.config.options import option, parse_options, positional, problems_of
from library.optim.ema_profiles import LEAST_SIGMA_REL, MOST_SIGMA_REL
from library.sdxl.model_source import ModelOptions

DESCRIPTION = "Build the model of any EMA length from snapshots (--ema_snapshot_every_n_steps of sdxl_train.py)."
_DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ReconstructOptions:
    """Which average is built, and where."""

    _argument_group_name: ClassVar[str] = "EMA of any length"

    snapshots: Path = positional("Folder of the snapshots: <output name>-ema-snapshots in the output folder.")
    output: Path = positional(
        "Model to write: a .safetensors or .ckpt file, or the name of a diffusers folder. Nothing is overwritten."
    )
    sigma_rel: float | None = option(
        None,
        "Length of the average: the standard deviation of its profile as a fraction of the run. 0.05 averages the last "
        "tenth or so, 0.2 half of the run.",
        least=LEAST_SIGMA_REL,
        most=MOST_SIGMA_REL,
    )
    step: int | None = option(
        None, "Build the average as it was after this step. Default: the last snapshot's.", least=1, most=MOST_STEPS
    )
    save_precision: str = option("fp16", "Precision of the weights in the file.", choices=tuple(_DTYPES))
    pretrained_model_name_or_path: str | None = option(
        None,
        "Model to take from what was not trained, such as the VAE: the one that was fine-tuned (the default), or one "
        "that the run has saved.",
    )
    run: str | None = option(None, "The run to use, where the folder holds snapshots of several; the error names them.")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.sigma_rel is None:
            yield "--sigma_rel is missing: choose a length, such as 0.1."
        if self.output.suffix.lower() in (".pt", ".pth", ".bin", ".sft"):
            yield f"the model to write is '{self.output}'; name a .safetensors or .ckpt file, or a folder."
        elif self.output.exists():
            yield f"'{self.output}' exists already and is not overwritten. Name another model to write."


OPTION_CLASSES: list[type] = [ReconstructOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Build the model; return the exit status."""
    (options,) = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    # Only now: a mistake on the command line is answered without the seconds that importing torch takes.
    import torch

    from library.training.ema_reconstruction import factors_of, reconstruct
    from library.training.ema_snapshots import find_snapshots

    snapshots = find_snapshots(options.snapshots, options.run)
    source = options.pretrained_model_name_or_path or snapshots[-1].record.model
    if not source or problems_of(ModelOptions(source)):
        raise UserError(
            f"the model that was fine-tuned is not at '{source}'." if source else "the run had a VAE of another model.",
            "Pass a model that the run has saved as --pretrained_model_name_or_path.",
        )
    factors = factors_of(snapshots, options.sigma_rel, options.step)
    step = snapshots[-1].record.step if options.step is None else options.step
    notes = {"ema.sigma_rel": f"{options.sigma_rel:g}", "ema.step": str(step)}
    reconstruct(factors, source, options.output, getattr(torch, _DTYPES[options.save_precision]), notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
