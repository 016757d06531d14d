"""The samplers, and what WebUIs and ComfyUI call them."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from library.sdxl.prediction import FLOW


class SamplerNames(NamedTuple):
    """A sampler and its noise schedule in the words of WebUIs (AUTOMATIC1111's family) and of ComfyUI's KSampler."""

    webui: str
    webui_schedule: str
    comfyui: str
    comfyui_schedule: str


_LINSPACE = ("Uniform", "normal")
_LINSPACE_WITHOUT_LAST = ("SGM Uniform", "sgm_uniform")
_LEADING = ("Automatic", "ddim_uniform")  # WebUIs have no schedule to choose for these samplers


def _names(webui: str, comfyui: str, schedule: tuple[str, str]) -> SamplerNames:
    return SamplerNames(webui, schedule[0], comfyui, schedule[1])


SAMPLER_NAMES = {
    "ddim": _names("DDIM", "ddim", _LEADING),
    "pndm": _names("PLMS", "ipndm", _LEADING),
    "lms": _names("LMS", "lms", _LINSPACE),
    "euler": _names("Euler", "euler", _LINSPACE),
    "euler_a": _names("Euler a", "euler_ancestral", _LINSPACE),
    "heun": _names("Heun", "heun", _LINSPACE),
    "dpm_2": _names("DPM2", "dpm_2", _LINSPACE),
    "dpm_2_a": _names("DPM2 a", "dpm_2_ancestral", _LINSPACE),
    # Other programs lack these two: their nearest solver without added noise stands for them.
    "dpmsolver": _names("DPM++ 2M", "dpmpp_2m", _LINSPACE_WITHOUT_LAST),
    "dpmsingle": _names("DPM++ 2M", "dpmpp_2m", _LINSPACE_WITHOUT_LAST),
    "dpmsolver++": _names("DPM++ 2M", "dpmpp_2m", _LINSPACE_WITHOUT_LAST),
}

SAMPLERS: tuple[str, ...] = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a"),
    *("dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)
"""The names of `--sample_sampler` and `--ss`; a leading `k_` makes no difference, as in kohya's trainers."""

FLOW_SAMPLERS = ("ddim", "euler", "heun", "dpmsolver++", "dpmsingle")
"""The samplers that can draw with a rectified flow."""


def plain_name(sampler: str) -> str:
    """Return a name of `SAMPLERS` without its `k_`."""
    return sampler.removeprefix("k_")


def sampler_misfits(samplers: Iterable[str], kind: str) -> Iterator[str]:
    """Yield which of the samplers cannot draw with models of this prediction type, in one sentence."""
    unfit = sorted({sampler for sampler in samplers if plain_name(sampler) not in FLOW_SAMPLERS})
    if kind == FLOW and unfit:
        yield f"the model is a flow, which {', '.join(unfit)} cannot draw; choose from {', '.join(FLOW_SAMPLERS)}."


def names_of(sampler: str) -> SamplerNames:
    """Return what other programs call one of `SAMPLERS`."""
    return SAMPLER_NAMES[plain_name(sampler)]


def sampler_of(text: str) -> str | None:
    """Return the sampler that `text` names, here, in WebUIs or in ComfyUI, in any case; None if it names none.

    >>> sampler_of("Euler a"), sampler_of("DPM++ 2M")
    ('euler_a', 'dpmsolver++')
    """
    return _SPELLINGS.get(_spelling(text))


def _spelling(text: str) -> str:
    return re.sub(r"[\s_-]+", "_", text.strip().lower())


_SPELLINGS = {  # of equal names the last one counts
    **{_spelling(names.webui): sampler for sampler, names in SAMPLER_NAMES.items()},
    **{_spelling(names.comfyui): sampler for sampler, names in SAMPLER_NAMES.items()},
    **{sampler: sampler for sampler in SAMPLERS},
}
