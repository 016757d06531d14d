"""accelerate's object for a run. What processes do together is tested in tests/correctness/test_two_processes.py."""

from pathlib import Path

import pytest
import torch

from library.config.errors import UserError
from library.data.dataset import Batch
from library.sdxl.text_encoding import EncodedText, TextWeights
from library.sdxl.tokenizers import CaptionTokens
from library.training.accelerator import draw_seed, make_accelerator, require_devices, start_step, step_seed
from library.training.distribution import any_process, exchange_gradients, mean_over_processes
from library.training.precision import PrecisionOptions
from library.training.progress import BY_IMAGE, BY_STEP


@pytest.fixture
def accelerator(fresh_accelerate):
    return make_accelerator(PrecisionOptions(), [], None)


def test_it_computes_and_logs_as_the_options_say(tmp_path: Path, fresh_accelerate):
    made = make_accelerator(PrecisionOptions(mixed_precision="bf16"), ["tensorboard"], str(tmp_path))
    assert made.mixed_precision == "bf16"
    assert made.project_dir == str(tmp_path)
    assert [str(name) for name in made.log_with] == ["tensorboard"]


def test_gradients_lie_in_the_buffers_of_their_exchange(accelerator):
    assert accelerator.ddp_handler.gradient_as_bucket_view


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


@pytest.mark.parametrize("flag", [True, False])
def test_of_one_process_its_own_flag_holds(flag: bool, accelerator):
    assert any_process(accelerator, flag) is flag


def batch_of(*noise_seeds: int) -> Batch:
    empty = torch.empty(0)
    nothing = CaptionTokens(empty, empty), empty, empty, empty, EncodedText(None, None, None), TextWeights()
    return Batch(None, None, *nothing, None, 1.0, True, ("a",) * len(noise_seeds), noise_seeds=noise_seeds)


def test_noise_is_drawn_by_image_and_in_runs_begun_before_by_step_and_process():
    by_image = [start_step(7, step, process, BY_IMAGE)(batch_of(5, 6)) for step, process in ((1, 0), (2, 1))]
    assert [[each.initial_seed() for each in generators] for generators in by_image] == [[5, 6], [5, 6]]
    by_step = start_step(7, 3, 1, BY_STEP)
    [first], [second] = by_step(batch_of(5, 6)), by_step(batch_of(8))
    assert first is second, "one batch goes on where the other has ended"
    assert first.initial_seed() == step_seed(7, 3, 1) == 13539295938980708179


def test_each_step_of_each_process_has_a_seed_of_its_own_that_comes_back():
    seeds = [step_seed(seed, step, process) for seed in (1, 2, 11) for step in (1, 2, 11) for process in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [step_seed(seed, step, process) for seed in (1, 2, 11) for step in (1, 2, 11) for process in (0, 1)]
    torch.Generator().manual_seed(max(seeds))  # none is too large


@pytest.mark.parametrize(
    ("num_gpus", "environment", "is_refused"),
    [
        (1, {"LOCAL_WORLD_SIZE": "2"}, True),
        (1, {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, False),
        (0, {"LOCAL_WORLD_SIZE": "2"}, False),
        (2, {"LOCAL_WORLD_SIZE": "2"}, False),
        (1, {}, False),
    ],
)
def test_processes_that_have_no_gpu_are_refused_unless_all_are_on_the_cpu(
    num_gpus: int, environment: dict[str, str], is_refused: bool, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not is_refused:
        require_devices()
        return
    with pytest.raises(UserError, match="2 processes are started on this machine, which has 1 GPUs"):
        require_devices()
