"""accelerate's object for a run. What processes do together is tested in tests/test_two_processes.py."""

from datetime import datetime
from pathlib import Path

import pytest
import torch

from library.training.accelerator import draw_seed, exchange_gradients, make_accelerator, mean_over_processes
from library.training.precision import PrecisionOptions
from library.training.tracking import TrackingOptions

NOW = datetime(2026, 2, 3, 4, 5, 6)


@pytest.fixture
def accelerator(fresh_accelerate):
    return make_accelerator(PrecisionOptions(), TrackingOptions(), NOW)


def test_it_computes_and_logs_as_the_options_say(tmp_path: Path, fresh_accelerate):
    made = make_accelerator(PrecisionOptions(mixed_precision="bf16"), TrackingOptions(logging_dir=tmp_path), NOW)
    assert made.mixed_precision == "bf16"
    assert made.project_dir == tmp_path / "20260203040506"
    assert [str(name) for name in made.log_with] == ["tensorboard"]


def test_gradients_of_several_batches_add_up_undivided(accelerator):
    layer = torch.nn.Linear(2, 1, bias=False)
    network = accelerator.prepare(layer)
    for now in (False, False, True):
        with exchange_gradients(accelerator, [network], now=now):
            accelerator.backward(network(torch.ones(1, 2, device=accelerator.device)).sum())
    assert layer.weight.grad.tolist() == [[3.0, 3.0]]


def test_the_mean_over_one_process_is_its_own_number(accelerator):
    value = torch.tensor(0.25, device=accelerator.device)
    assert mean_over_processes(accelerator, value) == 0.25
    assert value.item() == 0.25


def test_a_drawn_seed_is_one_that_could_be_given(accelerator):
    seeds = {draw_seed(accelerator) for _ in range(3)}
    assert len(seeds) == 3  # two alike once in a thousand million runs
    assert all(0 <= seed < 2**32 for seed in seeds)
