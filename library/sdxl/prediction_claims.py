"""What a model says that it predicts: in its marker tensors, in its header, in the scheduler of its folder."""

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from library.config.errors import UserError
from library.sdxl.prediction import (
    EPSILON,
    FLOW,
    FLOW_SHIFT_KEY,
    PREDICTION_KEY,
    SDXL_PREDICTION,
    VELOCITY,
    VELOCITY_MARKER,
    ZERO_TERMINAL_SNR_MARKER,
    Prediction,
)

MARKERS = {
    VELOCITY_MARKER: VELOCITY,
    "edm_vpred.sigma_max": "edm",
    "edm_mean": "edm",
}
"""Tensors of a single file that say what the model predicts, as ComfyUI knows them; their values mean nothing."""

_HEADER_KEYS = (PREDICTION_KEY, "modelspec.predict_key")
_SCHEDULER_FAMILIES = {"EDM": "edm", "FlowMatch": FLOW}
"""Prefixes of diffusers' scheduler classes that are made for one kind of model."""
_SCHEDULER_FIELDS = {
    "num_train_timesteps": "num_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
}
_FLOW_SHIFTS = ("shift", "flow_shift")
"""Keys of diffusers' schedulers for flows: the first of FlowMatch schedulers, the other of those that learnt it."""
_SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), EPSILON),
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "velocity"), VELOCITY),
    **dict.fromkeys(("flow", "flow_matching", "flow_prediction", "rectified_flow"), FLOW),
}


class _Claim(NamedTuple):
    """A place where a model says what it predicts, and what it says there."""

    place: str
    kind: str


@dataclass(frozen=True)
class FoundPrediction:
    """What a model predicts, and the places where it says so; without any it is taken to be as SDXL base."""

    prediction: Prediction
    places: tuple[str, ...] = ()


def find_prediction(
    source: str, names: Collection[str], header: Mapping[str, str], scheduler: Mapping[str, Any]
) -> FoundPrediction:
    """Return what the model of `source` says that it predicts; what it does not say is as in SDXL base.

    `names` are those of its tensors and `header` is the metadata of a single file, `scheduler` the configuration of a
    diffusers folder's scheduler. A kind that is not known is returned as it is written. Raise `UserError` if the places
    contradict each other.
    """
    claims = [*_claims_of_markers(names), *_claims_of_header(header), *_claims_of_scheduler(scheduler)]
    if len({claim.kind for claim in claims}) > 1:
        said = ", ".join(f"{claim.place} says {reprlib.repr(claim.kind)}" for claim in claims)
        raise UserError(
            f"'{source}' contradicts itself about what it predicts: {said}.",
            "Find out what the model predicts, and correct what is wrong.",
        )
    kind = claims[0].kind if claims else SDXL_PREDICTION.kind
    settings = {field: scheduler[key] for key, field in _SCHEDULER_FIELDS.items() if scheduler.get(key) is not None}
    if kind == FLOW:
        settings = _flow_settings(source, header, scheduler)
    has_zero_terminal_snr = ZERO_TERMINAL_SNR_MARKER in names or bool(scheduler.get("rescale_betas_zero_snr"))
    prediction = Prediction(kind=kind, has_zero_terminal_snr=has_zero_terminal_snr, **settings)
    return FoundPrediction(prediction, tuple(claim.place for claim in claims))


def _flow_settings(source: str, header: Mapping[str, str], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to know of a flow beside its kind: its number of timesteps, and its shift."""
    said = [scheduler[key] for key in _FLOW_SHIFTS if scheduler.get(key) is not None]
    said += [header[key] for key in (FLOW_SHIFT_KEY,) if key in header]
    try:
        shift = float(said[0]) if said else 1.0
    except (TypeError, ValueError):
        shift = math.nan
    if not 0 < shift < math.inf:
        raise UserError(
            f"'{source}' is drawn with a flow shift of {reprlib.repr(said[0])}.", "Correct it: 1 shifts nothing."
        )
    if scheduler.get("use_dynamic_shifting"):
        raise UserError(
            f"'{source}' shifts its flow by the size of the image (use_dynamic_shifting), which SDXL does not.",
            "Correct its scheduler_config.json.",
        )
    num_timesteps = scheduler.get("num_train_timesteps")
    return {"flow_shift": shift, **({} if num_timesteps is None else {"num_timesteps": num_timesteps})}


def _claims_of_markers(names: Collection[str]) -> Iterator[_Claim]:
    for marker, kind in MARKERS.items():
        if marker in names:
            yield _Claim(f"the tensor '{marker}'", kind)


def _claims_of_header(header: Mapping[str, str]) -> Iterator[_Claim]:
    for key in _HEADER_KEYS:
        if header.get(key, "").strip():
            yield _Claim(f"{key} in the header", _kind_of(header[key]))


def _claims_of_scheduler(scheduler: Mapping[str, Any]) -> Iterator[_Claim]:
    name = str(scheduler.get("_class_name"))
    families = [kind for prefix, kind in _SCHEDULER_FAMILIES.items() if name.startswith(prefix)]
    if families:  # for them `prediction_type` means something else
        yield _Claim(f"the scheduler {reprlib.repr(name)}", families[0])
        return
    if scheduler.get("use_flow_sigmas"):
        yield _Claim("use_flow_sigmas of the scheduler", FLOW)
    if scheduler.get("prediction_type"):
        yield _Claim("prediction_type of the scheduler", _kind_of(scheduler["prediction_type"]))


def _kind_of(said: Any) -> str:
    word = str(said).strip().lower().replace("-", "_").replace(" ", "_")
    return _SPELLINGS.get(word, word)
