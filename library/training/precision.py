"""In which precision each part of the model is held, run and saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from library.config.options import option
from library.optim.rounding import NEAREST, ROUNDINGS, STOCHASTIC
from library.sdxl.checkpoint_file import ModelDtypes

_DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PrecisionOptions:
    """Number formats."""

    _argument_group_name: ClassVar[str] = "Precision"

    mixed_precision: str = option("no", "Precision of the computation.", choices=("no", "fp16", "bf16"))
    full_bf16: bool = option(False, "Hold the trained weights and their gradients in bfloat16 too (half the memory).")
    bf16_rounding: str | None = option(
        None,
        "How --full_bf16 rounds new weights: stochastic (up or down at random, right on average; where not given), "
        "kahan (keeps what is cut off: 2 bytes a weight more) or nearest (loses steps that are too small).",
        choices=(*ROUNDINGS, None),
    )
    save_precision: str | None = option(
        None, "Precision of saved weights; as they are held where not given.", choices=("float", "fp16", "bf16", None)
    )

    @property
    def save_dtype(self) -> torch.dtype | None:
        """The precision of saved weights, None for as they are held."""
        return None if self.save_precision is None else _DTYPES[self.save_precision]

    @property
    def rounding(self) -> str:
        """How new weights are rounded, one of `ROUNDINGS`; float32 ones to nearest, as every operation does."""
        if not self.full_bf16:
            return NEAREST
        return self.bf16_rounding or STOCHASTIC

    def model_dtypes(self, *, trains_l: bool, trains_g: bool, float32_vae: bool) -> ModelDtypes:
        """What each part is held in: trained ones in float32 (or bfloat16), frozen ones as they are computed in."""
        frozen = _DTYPES[self.mixed_precision]
        trained = torch.bfloat16 if self.full_bf16 else torch.float32
        return ModelDtypes(
            unet=trained,
            vae=torch.float32 if float32_vae else frozen,
            text_encoder_l=trained if trains_l else frozen,
            text_encoder_g=trained if trains_g else frozen,
        )

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.full_bf16 and self.mixed_precision != "bf16":
            yield f"--full_bf16 needs --mixed_precision=bf16, not {self.mixed_precision}."
        if self.bf16_rounding is not None and not self.full_bf16:
            yield "--bf16_rounding has no effect without --full_bf16; add it or leave the rounding out."
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            yield "--mixed_precision=fp16 needs a GPU; use bf16 or no."
