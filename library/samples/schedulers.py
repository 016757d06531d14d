"""The diffusers schedulers behind the names of samplers, made for what a model predicts."""

import inspect
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from library.samples.sampler_names import FLOW_SAMPLERS, plain_name
from library.sdxl.noise_schedule import betas_above_zero
from library.sdxl.prediction import FLOW, VELOCITY, Prediction

_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    # Latents are not confined to -1..1: clipping them, as kohya's trainers do for ddim, greys the image.
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    # Without the Runge-Kutta start, which fails below four steps (as in Stable Diffusion's own configuration).
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "lms": (LMSDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm_2": (KDPM2DiscreteScheduler, {}),
    "dpm_2_a": (KDPM2AncestralDiscreteScheduler, {}),
    "dpmsolver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": (DPMSolverSinglestepScheduler, {}),
}


class _FlowSteps:
    """What diffusers' SDXL pipeline asks of a scheduler and the FlowMatch family lacks.

    The noise levels of n steps are 1, (n - 1) / n ... 1 / n, then shifted, as the pipelines of flow models pass them;
    by themselves these schedulers spend their last step between 0.001 and 0.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.sigma_max, self.sigma_min = 1.0, 1 / num_inference_steps
        super().set_timesteps(num_inference_steps, device=device)  # type: ignore[misc]


class _FlowEuler(_FlowSteps, FlowMatchEulerDiscreteScheduler): ...


class _FlowHeun(_FlowSteps, FlowMatchHeunDiscreteScheduler): ...


_FLOW_SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "dpmsingle": DPMSolverSinglestepScheduler}


def make_sampling_scheduler(name: str, prediction: Prediction) -> Any:
    """Return diffusers' scheduler for a name of `--sample_sampler` and a model that predicts this.

    A flow has the samplers of `FLOW_SAMPLERS` alone. Of them ddim is Euler's method: for a flow, a step of DDIM is the
    same step.
    """
    name = plain_name(name)
    if prediction.kind == FLOW:
        assert name in FLOW_SAMPLERS  # checked before the model is loaded
        return _flow_scheduler(name, prediction)
    scheduler_class, settings = _SCHEDULERS[name]
    settings = {**prediction.scheduler_settings(), **settings}
    if not prediction.has_zero_terminal_snr:
        return scheduler_class(**settings)
    known = inspect.signature(scheduler_class.__init__).parameters
    if prediction.kind == VELOCITY and "timestep_spacing" in known:
        settings["timestep_spacing"] = "trailing"  # from the last timestep on, which alone is pure noise
    if prediction.kind == VELOCITY and "rescale_betas_zero_snr" in known:
        return scheduler_class(**settings, rescale_betas_zero_snr=True)
    return scheduler_class(**settings, trained_betas=betas_above_zero(prediction))


def _flow_scheduler(name: str, prediction: Prediction) -> Any:
    size, shift = prediction.num_timesteps, prediction.flow_shift
    if name in _FLOW_SOLVERS:
        return _FLOW_SOLVERS[name](
            num_train_timesteps=size, prediction_type=FLOW, use_flow_sigmas=True, flow_shift=shift
        )
    return (_FlowHeun if name == "heun" else _FlowEuler)(num_train_timesteps=size, shift=shift)
