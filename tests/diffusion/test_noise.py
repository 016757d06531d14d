"""Noise and timesteps, bit for bit as the reference trainer drew them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from library.config.options import problems_of
from library.diffusion import noise
from library.diffusion.noise import draw_noise
from library.diffusion.objective import Objective
from library.diffusion.options import NoiseOptions, TimestepOptions
from library.sdxl.noise_schedule import make_noise_schedule
from library.sdxl.prediction import SDXL_PREDICTION

GOLDEN = Path(__file__).parents[1] / "golden"
NOISE = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "noise.npz").items()}
INDEX = json.loads((GOLDEN / "noise_index.json").read_text(encoding="utf-8"))["entries"]
OPTIONS = {
    "plain": NoiseOptions(),
    "seed": NoiseOptions(noise_offset=0.0357, adaptive_noise_scale=0.00357),
    "multires": NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.3),
}
CASES = [entry for entry in INDEX if "case" in entry]
LATENTS = NOISE["latents_fp32"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_schedule_is_the_one_that_sdxl_was_trained_with():
    schedule = make_noise_schedule(SDXL_PREDICTION)
    golden = np.load(GOLDEN / "schedule_standard.npz")
    assert np.array_equal(schedule.betas.numpy(), golden["betas"])
    assert np.array_equal(schedule.alphas_cumprod.numpy(), golden["alphas_cumprod"])


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["case"])
def test_a_training_draw_equals_the_reference_bit_for_bit(entry: dict, monkeypatch):
    name, precision = entry["case"].split("_")
    latents = LATENTS.bfloat16() if precision == "bf16" else LATENTS
    generator = seeded(42)
    # The reference takes the sizes of the lower resolutions from Python's generator instead of torch's.
    sizes = random.Random(42)
    monkeypatch.setattr(noise, "_uniform", lambda generator: sizes.random())
    drawn = Objective(OPTIONS[name]).draw(latents, [generator])
    assert str(drawn.noise.dtype) == entry["dtype_noise"]
    assert str(drawn.latents.dtype) == entry["dtype_noisy"]
    assert torch.equal(drawn.noise.float(), NOISE[f"{entry['case']}_noise"])
    # Square roots of the schedule come from the processor's vector library: some differ from others in the last bit,
    # 2**-24 of numbers up to 1, which is multiplied by latents and noise of up to 4.
    torch.testing.assert_close(drawn.latents.float(), NOISE[f"{entry['case']}_noisy"], rtol=0, atol=4 * 2**-23)
    assert torch.equal(drawn.timesteps, NOISE[f"{entry['case']}_timesteps"])
    # Nothing more was drawn: the next number is the reference's as well.
    assert torch.rand((), generator=generator).item() == entry["next_torch_rand_after_call"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_resumed_from_the_state_of_its_generator_draws_the_same(options: NoiseOptions):
    generator = seeded(7)
    draw_noise(LATENTS, options, [generator])
    state = generator.get_state()
    expected = draw_noise(LATENTS, options, [generator])
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(draw_noise(LATENTS, options, [resumed]), expected)


@pytest.mark.parametrize(
    ("options", "timesteps"),
    [
        (NoiseOptions(), TimestepOptions()),
        (
            NoiseOptions(
                noise_offset=0.1,
                noise_offset_random_strength=True,
                adaptive_noise_scale=0.01,
                multires_noise_iterations=6,
                ip_noise_gamma=0.1,
                ip_noise_gamma_random_strength=True,
            ),
            TimestepOptions(timestep_sampling="logit_normal", stratified_timesteps=True),
        ),
    ],
    ids=["usual", "all"],
)
def test_an_image_draws_the_same_in_a_batch_and_alone(options: NoiseOptions, timesteps: TimestepOptions):
    objective = Objective(options, timesteps=timesteps)
    latents = torch.randn(3, 4, 24, 16, generator=seeded(0))
    together = objective.draw(latents, [seeded(place) for place in range(3)], (0, 3, 5))
    for place in range(3):
        alone = objective.draw(latents[place : place + 1], [seeded(place)], (place, 3, 5))
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[place : place + 1], other)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_coarser_noise_has_unit_variance_and_new_sizes_at_every_draw():
    options, generator = OPTIONS["multires"], seeded(7)
    latents = torch.zeros(2, 4, 64, 64)
    first, second = (draw_noise(latents, options, [generator]) for _ in range(2))
    # Divided by its own standard deviation: 1 up to the rounding of 32768 float32 numbers.
    assert first.std().item() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(first, second)


def test_a_negative_adaptive_scale_never_turns_the_offset_negative():
    bright = torch.full((1, 4, 8, 8), 100.0)
    options = NoiseOptions(noise_offset=0.1, adaptive_noise_scale=-1.0)
    assert torch.equal(draw_noise(bright, options, [seeded(1)]), draw_noise(bright, NoiseOptions(), [seeded(1)]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (NoiseOptions(noise_offset=-0.1), "--noise_offset is -0.1"),
        (NoiseOptions(adaptive_noise_scale=0.01), "--noise_offset, which is not set"),
        (NoiseOptions(noise_offset=0.1, adaptive_noise_scale=float("nan")), "--adaptive_noise_scale is nan"),
        (NoiseOptions(multires_noise_iterations=-1), "--multires_noise_iterations is -1"),
        (NoiseOptions(multires_noise_discount=1.5), "--multires_noise_discount is 1.5"),
        (NoiseOptions(noise_offset_random_strength=True), "--noise_offset, which is not set"),
        (NoiseOptions(ip_noise_gamma=-0.1), "--ip_noise_gamma is -0.1"),
        (NoiseOptions(ip_noise_gamma_random_strength=True), "--ip_noise_gamma, which is not set"),
    ],
)
def test_values_that_cannot_work_are_named(options: NoiseOptions, expected: str):
    [problem] = problems_of(options)
    assert expected in problem


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sound_values_have_no_problems(options: NoiseOptions):
    assert problems_of(options) == []
