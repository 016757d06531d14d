"""The flags of moving averages of the weights."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from library.config.magnitudes import MOST_STEPS
from library.config.options import option
from library.optim.ema_profiles import LEAST_SIGMA_REL, MOST_SIGMA_REL, Decay, PowerFunction, Profile

if TYPE_CHECKING:  # a mistake on the command line is answered before torch is imported
    import torch

EMA = "ema"
"""Name of the average of --ema: in states, in names of models and samples, in validation."""

_MOST_STEPS_BETWEEN = 10_000
_MOST_PROFILES = 8
_DTYPES = {"float": "float32", "bf16": "bfloat16"}
_OF_EMA = ("ema_decay", "ema_power")
_OF_ANY = ("ema_every", "ema_precision", "ema_device")


@dataclass(frozen=True)
class EmaOptions:
    """Moving averages of the trained weights."""

    _argument_group_name: ClassVar[str] = "Moving averages (EMA)"

    ema: bool = option(
        False,
        "Keep an exponential moving average of the trained weights. Its model is saved beside each saved model, under "
        "the name with _ema.",
    )
    ema_decay: float = option(
        0.9999,
        "Largest decay of --ema in one optimizer step; the part of the average that is kept. It is warmed up as "
        "(1 + step) / (10 + step).",
        least=0,
        most=1,
    )
    ema_power: float | None = option(
        None,
        "Warm --ema_decay up as 1 - (1 + step) ** -power instead: 2/3 for very long runs, 3/4 for others.",
        least=0.01,
        most=10,
    )
    ema_every: int = option(
        1,
        "Update the averages every n optimizer steps, with the decay of all n: cheaper, with the same length.",
        least=1,
        most=_MOST_STEPS_BETWEEN,
    )
    ema_precision: str = option(
        "float",
        "Precision of the averages: float32 (float), or bf16 with stochastic rounding, which takes half the memory.",
        choices=tuple(_DTYPES),
    )
    ema_device: str = option(
        "gpu",
        "Keep the averages on the device of training (gpu) or in host memory (cpu), which costs a copy of the weights "
        "at each update; raise --ema_every for it.",
        choices=("gpu", "cpu"),
    )
    ema_snapshot_every_n_steps: int | None = option(
        None,
        "Keep averages of two lengths and save both every n optimizer steps and at the end, so that "
        "finetune/reconstruct_ema.py can build the model of any EMA length after training.",
        least=1,
        most=MOST_STEPS,
    )
    ema_sigma_rel: list[float] = option(
        [0.05, 0.1],
        "Lengths of the averages of --ema_snapshot_every_n_steps: standard deviations as fractions of the run, from "
        f"{LEAST_SIGMA_REL} to {MOST_SIGMA_REL}.",
    )

    @property
    def profiles(self) -> dict[str, Profile]:
        """The averages that are kept, by name, and how each forgets."""
        kept: dict[str, Profile] = {EMA: Decay(self.ema_decay, self.ema_power)} if self.ema else {}
        return kept | {profile_name(width): PowerFunction(width) for width in self.snapshot_widths}

    @property
    def snapshot_widths(self) -> list[float]:
        """The lengths of which snapshots are saved, if any are."""
        return [] if self.ema_snapshot_every_n_steps is None else sorted(self.ema_sigma_rel)

    @property
    def dtype(self) -> "torch.dtype":
        """The precision of the averages."""
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[self.ema_precision])
        return dtype

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        defaults = {field.name: getattr(EmaOptions(), field.name) for field in fields(self)}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        for name in changed:
            if name in _OF_EMA and not self.ema:
                yield f"--{name} has no effect without --ema; add it or leave out --{name}."
            if name in _OF_ANY and not self.profiles:
                yield f"--{name} has no effect without --ema or --ema_snapshot_every_n_steps; add one of them."
        if "ema_sigma_rel" in changed and self.ema_snapshot_every_n_steps is None:
            yield "--ema_sigma_rel has no effect without --ema_snapshot_every_n_steps; add it."
        widths = self.ema_sigma_rel
        for width in widths:
            if not LEAST_SIGMA_REL <= width <= MOST_SIGMA_REL:
                yield f"--ema_sigma_rel is {width}; it must be from {LEAST_SIGMA_REL} to {MOST_SIGMA_REL}."
        names = {profile_name(width) for width in widths}
        if not 1 <= len(widths) <= _MOST_PROFILES or len(names) < len(widths):
            yield f"--ema_sigma_rel takes 1 to {_MOST_PROFILES} different lengths, such as 0.05 0.1."


def profile_name(sigma_rel: float) -> str:
    """Return the name of an average by a power function: "sigma0.050"."""
    return f"sigma{sigma_rel:.3f}"
