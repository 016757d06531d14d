"""What the user says that the model predicts, and whether that agrees with the model."""

import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from library.config.errors import UserError
from library.config.options import option
from library.sdxl.prediction import EPSILON, FLOW, SDXL_PREDICTION, VELOCITY, Prediction
from library.sdxl.prediction_claims import FoundPrediction

_KIND_OF_FLAG = {"noise_prediction": EPSILON, "v_parameterization": VELOCITY, "flow_matching": FLOW}
_WORDS = {EPSILON: "noise (epsilon)", VELOCITY: "velocity (v)", FLOW: "a flow"}
_CHOSEN_FREELY = ("kind", "has_zero_terminal_snr", "flow_shift")


@dataclass(frozen=True)
class PredictionOptions:
    """What the model predicts: it is found out from the file, and saved again."""

    _argument_group_name: ClassVar[str] = "Prediction type"

    v_parameterization: bool = option(
        False, "The model predicts velocity (v-prediction). Needed only for files that do not say so themselves."
    )
    flow_matching: bool = option(
        False, "The model is a rectified flow. Needed only for files that do not say so themselves."
    )
    noise_prediction: bool = option(
        False, "The model predicts noise (epsilon), as SDXL base does. Needed only with --convert_prediction."
    )
    zero_terminal_snr: bool = option(
        False,
        "Rescale the betas until nothing is left of the image at the last timestep (Lin et al. 2023). Made for "
        "--v_parameterization. Models that say so themselves keep it without the flag.",
    )
    flow_shift: float | None = option(
        None,
        "Draw images of a flow with noise levels shifted towards noise by this factor (Esser et al. 2024), which suits "
        "large images; it is saved with the model. Default: that of the model, or 1, which shifts nothing.",
        least=0.01,
        most=100,
    )
    convert_prediction: bool = option(
        False, "Move a model to another prediction type than its file says: the one whose flag is set with this one."
    )

    @property
    def kind(self) -> str | None:
        """The prediction type that the flags set; None leaves it to the file."""
        chosen = [kind for flag, kind in _KIND_OF_FLAG.items() if getattr(self, flag)]
        return chosen[0] if chosen else None

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        chosen = [flag for flag in _KIND_OF_FLAG if getattr(self, flag)]
        if len(chosen) > 1:
            yield f"{' and '.join(f'--{flag}' for flag in chosen)} exclude each other; keep one."
        if self.convert_prediction and not chosen:
            yield (
                "--convert_prediction: nothing says to what; add --v_parameterization, --flow_matching or "
                "--noise_prediction."
            )
        if self.flow_shift is not None and self.kind not in (None, FLOW):
            yield f"--flow_shift belongs to flows, and --{_flag_of(str(self.kind))} says that this is none; remove it."
        if self.zero_terminal_snr and self.flow_matching:
            yield "--zero_terminal_snr rescales betas, and a flow has none: it ends in pure noise anyway; remove it."

    def settled(self, source: str, found: FoundPrediction) -> Prediction:
        """Return what is trained, by the model of `source` and by these flags.

        Raise `UserError` for a kind or a noise schedule that is not known here, and for flags that contradict the file.
        """
        said = found.prediction
        _require_known(source, said)
        if self.convert_prediction and self.kind == said.kind and found.places:
            raise UserError(
                f"--convert_prediction: '{source}' predicts {_WORDS[said.kind]} already ({found.places[0]}).",
                "Remove --convert_prediction.",
            )
        kind = self.kind or said.kind
        if kind != said.kind and found.places and not self.convert_prediction:
            raise UserError(
                f"--{_flag_of(kind)}: '{source}' predicts {_WORDS[said.kind]}: {found.places[0]} says so.",
                f"Remove --{_flag_of(kind)} to use it as it is. In training, --convert_prediction moves it to "
                f"{_WORDS[kind]}, which takes thousands of steps.",
            )
        if kind == FLOW and self.zero_terminal_snr:
            raise UserError(
                f"--zero_terminal_snr rescales betas, and '{source}' is a flow, which has none.", "Remove the flag."
            )
        if kind != FLOW and self.flow_shift is not None:
            raise UserError(f"--flow_shift belongs to flows, and '{source}' is none.", "Remove the flag.")
        if kind != said.kind:  # what the file says of its schedule belongs to what it predicts
            said = Prediction(kind, has_zero_terminal_snr=_keeps_schedule(kind, found))
        return replace(
            said,
            has_zero_terminal_snr=said.has_zero_terminal_snr or self.zero_terminal_snr,
            flow_shift=said.flow_shift if self.flow_shift is None else self.flow_shift,
        )


AS_THE_MODEL_SAYS = PredictionOptions()


def _keeps_schedule(kind: str, found: FoundPrediction) -> bool:
    """Whether the rescaled betas of a file hold for `kind`: it says nothing of its kind, and a flow has none."""
    return not found.places and kind != FLOW and found.prediction.has_zero_terminal_snr


def _flag_of(kind: str) -> str:
    return next(flag for flag, each in _KIND_OF_FLAG.items() if each == kind)


def _require_known(source: str, prediction: Prediction) -> None:
    """Raise `UserError` unless models of this kind can be trained, with the noise schedule of SDXL."""
    if prediction.kind not in _WORDS:
        raise UserError(
            f"'{source}' says that it predicts {reprlib.repr(prediction.kind)}, which is not known here.",
            "Only models that predict noise (epsilon), velocity (v) or a rectified flow can be fine-tuned.",
        )
    if prediction.kind == FLOW and prediction.has_zero_terminal_snr:
        raise UserError(
            f"'{source}' contradicts itself: it is a flow, and has rescaled betas.",
            "Find out what the model predicts, and correct what is wrong.",
        )
    usual = asdict(SDXL_PREDICTION)
    for name, value in asdict(prediction).items():
        if name not in _CHOSEN_FREELY and value != usual[name]:
            raise UserError(
                f"'{source}' has another noise schedule than SDXL: {name} is {reprlib.repr(value)} and not "
                f"{usual[name]!r}.",
                "Correct its scheduler_config.json if that is wrong, else use another model.",
            )
