"""What the U-Net predicts, over which noise schedule: one record that training, sampling and saving read."""

import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from library.config.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """The prediction type and the betas of a diffusion model, in the terms of diffusers' schedulers.

    `kind` is diffusers' `prediction_type`. Under `scaled_linear` the square roots of the betas are linear from
    `beta_start` to `beta_end` over `num_timesteps` (Rombach et al. 2022). With `has_zero_terminal_snr` they are
    rescaled until nothing is left of the image at the last timestep (Lin et al. 2023, algorithm 1).
    """

    kind: str = "epsilon"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    has_zero_terminal_snr: bool = False

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments of a diffusers scheduler for this model, before zero terminal SNR rescales its betas."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.kind,
        }


SDXL_PREDICTION = Prediction()
"""SDXL base: the noise (epsilon) over 1000 timesteps."""


# -- what a model says of itself --------------------------------------------------------------------------------------

_MARKERS = {
    "v_pred": "v_prediction",
    "edm_vpred.sigma_max": "edm",
    "edm_mean": "edm",
}
"""Tensors of a single file that say what the model predicts, as ComfyUI knows them; their values mean nothing."""
_ZERO_TERMINAL_SNR_MARKER = "ztsnr"

_HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_SCHEDULER_FAMILIES = {"EDM": "edm", "FlowMatch": "flow_prediction"}
"""Prefixes of diffusers' scheduler classes that are made for one kind of model."""
_SCHEDULER_FIELDS = {
    "num_train_timesteps": "num_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
}
_SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("flow", "flow_matching", "flow_prediction", "rectified_flow"), "flow_prediction"),
}


class _Claim(NamedTuple):
    """A place where a model says what it predicts, and what it says there."""

    place: str
    kind: str


def find_prediction(
    source: str, names: Collection[str], header: Mapping[str, str], scheduler: Mapping[str, Any]
) -> Prediction:
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
            "Find out what the model predicts, and correct what is wrong. Only models that predict noise (epsilon) can "
            "be fine-tuned.",
        )
    settings = {field: scheduler[key] for key, field in _SCHEDULER_FIELDS.items() if scheduler.get(key) is not None}
    return Prediction(
        kind=claims[0].kind if claims else SDXL_PREDICTION.kind,
        has_zero_terminal_snr=_ZERO_TERMINAL_SNR_MARKER in names or bool(scheduler.get("rescale_betas_zero_snr")),
        **settings,
    )


def require_noise_prediction(source: str, prediction: Prediction) -> None:
    """Raise `UserError` unless the model of `source` predicts noise, with the noise schedule of SDXL."""
    if prediction.kind != SDXL_PREDICTION.kind:
        raise UserError(
            f"'{source}' does not predict noise (epsilon): it says {reprlib.repr(prediction.kind)}.",
            "Models that predict velocity or anything else cannot be fine-tuned; use one that predicts noise.",
        )
    usual = asdict(SDXL_PREDICTION)
    for name, value in asdict(prediction).items():
        if value != usual[name]:
            raise UserError(
                f"'{source}' has another noise schedule than SDXL: {name} is {reprlib.repr(value)} and not "
                f"{usual[name]!r}.",
                "Correct its scheduler_config.json if that is wrong, else use another model.",
            )


def _claims_of_markers(names: Collection[str]) -> Iterator[_Claim]:
    for marker, kind in _MARKERS.items():
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
        yield _Claim("use_flow_sigmas of the scheduler", _SPELLINGS["flow"])
    if scheduler.get("prediction_type"):
        yield _Claim("prediction_type of the scheduler", _kind_of(scheduler["prediction_type"]))


def _kind_of(said: Any) -> str:
    word = str(said).strip().lower().replace("-", "_").replace(" ", "_")
    return _SPELLINGS.get(word, word)
