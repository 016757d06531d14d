"""Samplers of each prediction type: they lead from noise to the image of a model that knows it, and never to NaN."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from library.samples.sampler_names import FLOW_SAMPLERS, SAMPLERS, plain_name, sampler_misfits
from library.samples.schedulers import make_sampling_scheduler
from library.sdxl.noise_schedule import make_noise_schedule
from library.sdxl.prediction import EPSILON, FLOW, VELOCITY, Prediction

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # within diffusers
BASIC_SAMPLERS = [name for name in SAMPLERS if name == plain_name(name)]
RESCALED = Prediction(VELOCITY, has_zero_terminal_snr=True)
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def drawn(name: str, prediction: Prediction, num_steps: int) -> torch.Tensor:
    """Latents drawn with a model that always knows `IMAGE`, as diffusers' pipeline draws them."""
    scheduler = make_sampling_scheduler(name, prediction)
    scheduler.set_timesteps(num_steps)
    noise = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(2))
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        step = {"generator": torch.Generator()} if name.endswith("_a") else {}
        latents = scheduler.step(_prediction_of(seen, timestep, prediction), timestep, latents, **step).prev_sample
    return latents


def _prediction_of(seen: torch.Tensor, timestep: torch.Tensor, prediction: Prediction) -> torch.Tensor:
    """What a perfect model predicts that takes whatever is not `IMAGE` for noise."""
    if prediction.kind == FLOW:
        return (seen - IMAGE) / (timestep / 1000)
    kept = make_noise_schedule(prediction).alphas_cumprod.clamp(min=2**-24)[int(timestep.round())]
    noise = (seen - kept.sqrt() * IMAGE) / (1 - kept).sqrt()
    return kept.sqrt() * noise - (1 - kept).sqrt() * IMAGE if prediction.kind == VELOCITY else noise


@pytest.mark.parametrize("name", BASIC_SAMPLERS)
@pytest.mark.parametrize("prediction", [Prediction(VELOCITY), RESCALED], ids=str)
def test_a_velocity_model_that_knows_the_image_draws_it(name: str, prediction: Prediction):
    error = (drawn(name, prediction, 25) - IMAGE).std()
    # What the sampler leaves of the noise at its last step, and what a multistep method adds.
    assert error < 0.25, error


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_a_flow_that_knows_the_image_draws_it(name: str):
    assert (drawn(name, Prediction(FLOW), 25) - IMAGE).std() < 0.05


@pytest.mark.parametrize("num_steps", [1, 3, 40])
@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        *((name, RESCALED) for name in BASIC_SAMPLERS),
        *((name, Prediction(EPSILON, has_zero_terminal_snr=True)) for name in BASIC_SAMPLERS),
        *((name, Prediction(FLOW, flow_shift=3.0)) for name in FLOW_SAMPLERS),
    ],
)
def test_no_sampler_divides_by_zero(name: str, prediction: Prediction, num_steps: int):
    scheduler = make_sampling_scheduler(name, prediction)
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps[:3]:
        seen = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(seen * 0.5, timestep, latents).prev_sample
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_zero_terminal_snr_is_diffusers_own(name: str):
    scheduler_class = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[name]
    theirs = scheduler_class(**RESCALED.scheduler_settings(), rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ours = make_sampling_scheduler(name, RESCALED)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    ours.set_timesteps(10)
    assert ours.timesteps[0] == 999


@pytest.mark.parametrize("name", [name for name in BASIC_SAMPLERS if name != "dpmsingle"])
def test_a_velocity_model_with_zero_terminal_snr_is_drawn_from_the_last_timestep(name: str):
    scheduler = make_sampling_scheduler(name, RESCALED)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999


def test_euler_and_ddim_are_the_same_for_a_flow_and_steps_are_even_before_the_shift():
    scheduler = make_sampling_scheduler("ddim", Prediction(FLOW, flow_shift=3.0))
    scheduler.set_timesteps(4)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas[:-1], 3 * even / (1 + 2 * even))
    assert torch.equal(drawn("ddim", Prediction(FLOW), 5), drawn("k_euler", Prediction(FLOW), 5))


def test_samplers_without_a_flow_are_named_with_those_that_have_one():
    [problem] = sampler_misfits(["euler", "k_lms", "pndm", "k_lms"], FLOW)
    assert (
        problem == "the model is a flow, which k_lms, pndm cannot draw; choose from " + ", ".join(FLOW_SAMPLERS) + "."
    )
    assert list(sampler_misfits(["k_lms"], VELOCITY)) == list(sampler_misfits(["k_euler", "heun"], FLOW)) == []
