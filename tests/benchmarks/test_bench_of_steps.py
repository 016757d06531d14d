"""What the bench of training steps counts and times."""

import time

import pytest
import torch

from benchmarks.random_model import forward_flops, random_model
from benchmarks.step_clock import StepClock, covered
from demo.random_sdxl import TINY
from library.sdxl.architecture import SDXL_BASE
from library.sdxl.checkpoint_file import ModelDtypes

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
NAP = 0.02  # seconds


def test_a_forward_pass_of_sdxl_is_seven_teraflop():
    assert forward_flops(SDXL_BASE, 1024, 1024) == pytest.approx(6.76e12, rel=1e-3)


def test_a_step_is_the_sum_of_its_parts_and_warm_up_steps_are_left_out():
    clock = StepClock(CPU, num_warm_up=1, num_measured=2)
    for nap in (20 * NAP, NAP, NAP):
        with clock.stretch("forward"):
            clock.count(num_flops=6, num_pictures=2)
            time.sleep(nap)
        time.sleep(NAP)
        clock.end_step()
    figures = clock.figures()
    parts = figures["forward_ms"] + figures["rest_ms"]
    assert figures["step_ms"] == pytest.approx(parts)
    assert 2e3 * NAP <= figures["step_ms"] < 20e3 * NAP  # two naps, and none of the warm-up
    assert (figures["flops"], figures["pictures"]) == (6, 2)
    assert figures["first_step_s"] >= 21 * NAP


@pytest.mark.parametrize(
    ("stretches", "expected"), [([], 0), ([(5, 6), (0, 2)], 3), ([(0, 4), (1, 2), (3, 5)], 5)], ids=str
)
def test_time_in_which_kernels_overlap_counts_once(stretches, expected):
    assert covered(stretches) == expected


def test_every_weight_of_a_random_model_is_drawn_in_the_precision_asked_for():
    model = random_model(TINY, ModelDtypes(unet=torch.float32), CPU)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.unet.parameters())
    assert model.unet.conv_in.weight.std().item() == pytest.approx(
        1 / 6, rel=0.2
    )  # 1 / sqrt(4 * 3 * 3), of 576 numbers
    assert {weight.dtype for weight in model.vae.parameters()} == {torch.bfloat16}
