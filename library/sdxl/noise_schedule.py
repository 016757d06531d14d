"""The noise schedule of a model: its betas, and what is left of the image at each timestep."""

from diffusers import DDPMScheduler

from library.sdxl.prediction import Prediction

_SMALLEST_ALPHA = 2.0**-24
"""What is left of the image at the last timestep where it cannot be nothing (the number that diffusers takes)."""


def make_noise_schedule(prediction: Prediction) -> DDPMScheduler:
    """Return the noise schedule of a model; for SDXL base betas from 0.00085 to 0.012 over 1000 timesteps.

    Zero terminal SNR rescales the betas before anything is derived from them.
    """
    return DDPMScheduler(
        **prediction.scheduler_settings(),
        rescale_betas_zero_snr=prediction.has_zero_terminal_snr,
        clip_sample=False,
    )


def betas_above_zero(prediction: Prediction) -> list[float]:
    """Return the rescaled betas with something left at the end, for what divides by it."""
    schedule = make_noise_schedule(prediction)
    *others, _ = schedule.betas.tolist()
    return [*others, 1 - _SMALLEST_ALPHA / schedule.alphas_cumprod[-2].item()]
