"""The precision in which each part of the model is held, run and saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.options import option
from library.optim.options import NEAREST, ROUNDINGS, STOCHASTIC

if TYPE_CHECKING:  # a mistake on the command line is answered before torch is imported
    import torch

    from library.sdxl.checkpoint_file import ModelDtypes

_DTYPES = {"no": "float32", "float": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class PrecisionOptions:
    """Number formats."""

    _argument_group_name: ClassVar[str] = "Precision"

    mixed_precision: str = option(
        "no", "Precision of the computation: float32 (no), fp16 or bf16.", choices=("no", "fp16", "bf16")
    )
    full_bf16: bool = option(
        False, "Hold the trained weights and their gradients in bfloat16 as well: half the memory."
    )
    bf16_rounding: str | None = option(
        None,
        "Rounding of updated weights with --full_bf16: stochastic (unbiased, the default), kahan (keeps the rounding "
        "error, 2 more bytes per weight) or nearest (loses updates that are too small).",
        choices=(*ROUNDINGS, None),
    )
    save_precision: str | None = option(
        None,
        "Precision of saved weights. Default: as they are held in training.",
        choices=("float", "fp16", "bf16", None),
    )

    @property
    def save_dtype(self) -> "torch.dtype | None":
        """The precision of saved weights; None keeps them as they are held."""
        return None if self.save_precision is None else dtype_of(self.save_precision)

    @property
    def rounding(self) -> str:
        """How updated weights are rounded, one of `ROUNDINGS`; float32 to nearest, as in every operation."""
        if not self.full_bf16:
            return NEAREST
        return self.bf16_rounding or STOCHASTIC

    def model_dtypes(self, *, trains_l: bool, trains_g: bool, float32_vae: bool) -> "ModelDtypes":
        """Return what each part is held in: trained in float32 (or bfloat16), frozen in the computation's precision."""
        import torch

        from library.sdxl.checkpoint_file import ModelDtypes

        frozen = dtype_of(self.mixed_precision)
        trained = torch.bfloat16 if self.full_bf16 else torch.float32
        return ModelDtypes(
            unet=trained,
            vae=torch.float32 if float32_vae else frozen,
            text_encoder_l=trained if trains_l else frozen,
            text_encoder_g=trained if trains_g else frozen,
        )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.full_bf16 and self.mixed_precision != "bf16":
            yield f"--full_bf16 needs --mixed_precision=bf16, not {self.mixed_precision}."
        if self.bf16_rounding is not None and not self.full_bf16:
            yield "--bf16_rounding has no effect without --full_bf16; add it or leave out --bf16_rounding."

    def heavy_problems(self) -> Iterator[str]:
        """Yield what is wrong on this machine; the GPU is asked through torch."""
        import torch

        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            yield "--mixed_precision=fp16 needs a GPU; use bf16 or no."


def dtype_of(name: str) -> "torch.dtype":
    """Return the precision that a value of `--mixed_precision` or `--save_precision` names."""
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype
