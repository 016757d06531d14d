"""Noisy latents and targets of each prediction type, against recorded values and diffusers' schedulers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions
from library.sdxl.noise_schedule import betas_above_zero, make_noise_schedule
from library.sdxl.prediction import EPSILON, FLOW, VELOCITY, Prediction

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "objective.npz").items()}
INDEX = json.loads((GOLDEN / "objective_index.json").read_text(encoding="utf-8"))
LATENTS, NOISE = ARRAYS["latents"], ARRAYS["noise"]
RESCALED = {"standard": False, "zero_terminal_snr": True}
KINDS = [
    Prediction(EPSILON),
    Prediction(EPSILON, has_zero_terminal_snr=True),
    Prediction(VELOCITY),
    Prediction(VELOCITY, has_zero_terminal_snr=True),
    Prediction(FLOW),
]


def objective(prediction: Prediction) -> Objective:
    return Objective(NoiseOptions(), prediction)


def test_zero_terminal_snr_rescales_the_betas_as_the_reference():
    schedule = make_noise_schedule(Prediction(VELOCITY, has_zero_terminal_snr=True))
    golden = np.load(GOLDEN / "schedule_zero_terminal_snr.npz")
    np.testing.assert_allclose(schedule.betas.numpy(), golden["betas"], rtol=2e-5, atol=4e-7)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), golden["alphas_cumprod"], rtol=2e-5, atol=1e-12)
    assert schedule.alphas_cumprod[-1] == 0


def test_betas_for_what_divides_by_the_signal_differ_in_the_last_alone():
    prediction = Prediction(VELOCITY, has_zero_terminal_snr=True)
    exact = make_noise_schedule(prediction)
    other = DDPMScheduler(trained_betas=betas_above_zero(prediction))
    assert torch.equal(other.alphas_cumprod[:-1], exact.alphas_cumprod[:-1])
    assert other.alphas_cumprod[-1].item() == pytest.approx(2**-24, rel=1e-5)


@pytest.mark.parametrize("subject", ["v_target", "noisy_latents"])
@pytest.mark.parametrize("number", range(4))
def test_velocity_models_learn_the_recorded_target_from_the_recorded_latents(subject: str, number: int):
    case = INDEX[subject][number]
    learnt = objective(Prediction(VELOCITY, has_zero_terminal_snr=RESCALED[case["schedule"]]))
    noisy = learnt.noised(LATENTS, NOISE, torch.tensor(case["timesteps"]))
    found = noisy.latents if subject == "noisy_latents" else learnt.target(LATENTS, noisy)
    # Square roots of the schedule differ in the last bits between machines; latents and noise are up to 4.
    torch.testing.assert_close(found, ARRAYS[case["array"]], rtol=0, atol=4e-6)


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_velocity_is_that_of_diffusers(rescaled: bool):
    timesteps = torch.tensor([0, 999])
    learnt = objective(Prediction(VELOCITY, has_zero_terminal_snr=rescaled))
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=rescaled
    )
    noisy = learnt.noised(LATENTS, NOISE, timesteps)
    assert torch.equal(noisy.latents, theirs.add_noise(LATENTS, NOISE, timesteps))
    assert torch.equal(learnt.target(LATENTS, noisy), theirs.get_velocity(LATENTS, NOISE, timesteps))


def test_a_flow_is_noised_as_diffusers_noises_it_and_leads_from_the_image_to_the_noise():
    timesteps = torch.tensor([1.0, 640.0])
    learnt = objective(Prediction(FLOW))
    noisy = learnt.noised(LATENTS, NOISE, timesteps)
    expected = FlowMatchEulerDiscreteScheduler().scale_noise(LATENTS, timesteps, NOISE)
    torch.testing.assert_close(noisy.latents, expected, rtol=0, atol=1e-6)
    assert torch.equal(learnt.target(LATENTS, noisy), NOISE - LATENTS)
    ends = learnt.noised(LATENTS, NOISE, torch.tensor([0, 1000]))
    assert torch.equal(ends.latents, torch.stack([LATENTS[0], NOISE[1]]))


@pytest.mark.parametrize("prediction", KINDS, ids=str)
def test_from_its_target_and_the_noisy_latents_the_image_comes_back(prediction: Prediction):
    timesteps = torch.tensor([100, 700])
    learnt = objective(prediction)
    noisy = learnt.noised(LATENTS, NOISE, timesteps)
    target = learnt.target(LATENTS, noisy)
    kept = make_noise_schedule(prediction).alphas_cumprod[timesteps][:, None, None, None]
    image = {
        EPSILON: (noisy.latents - (1 - kept).sqrt() * target) / kept.sqrt(),
        VELOCITY: kept.sqrt() * noisy.latents - (1 - kept).sqrt() * target,
        FLOW: noisy.latents - timesteps[:, None, None, None] / 1000 * target,
    }[prediction.kind]
    torch.testing.assert_close(image, LATENTS, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", KINDS, ids=str)
def test_the_plain_loss_is_the_squared_error_of_the_target(prediction: Prediction):
    learnt = objective(prediction)
    noisy = learnt.noised(LATENTS, NOISE, torch.tensor([0, 999]))
    target = learnt.target(LATENTS, noisy)
    assert learnt.plain_losses(target, LATENTS, noisy).tolist() == [0, 0]
    losses = learnt.plain_losses((target + 2).bfloat16().float(), LATENTS, noisy)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor([4.0, 4.0]), rtol=1e-2, atol=0)
    assert torch.equal(learnt.losses(target + 1, LATENTS, noisy), learnt.plain_losses(target + 1, LATENTS, noisy))
