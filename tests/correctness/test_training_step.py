"""Comparison 4: steps of sdxl_train.py against steps written out plainly: same losses, gradients and weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers.optimization import Adafactor

from library.data.epoch_order import BatchShape
from library.training.learner import Learner
from tests.conftest import PreparedSet
from tests.correctness.plain_training import PlainNoise, PlainTraining, batches_of_steps

SEED = 7
RATE = 1e-3
ADAFACTOR = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "weight_decay": 0.01}
ADAFACTOR_FLAGS = ("--optimizer_type=Adafactor", "--optimizer_args", *(f"{key}={ADAFACTOR[key]}" for key in ADAFACTOR))
NOISE = PlainNoise(offset=0.0357, adaptive_scale=0.00357, min_timestep=200, max_timestep=700)
NOISE_FLAGS = ("--noise_offset=0.0357", "--adaptive_noise_scale=0.00357", "--min_timestep=200", "--max_timestep=700")


@dataclass(frozen=True)
class Case:
    """Flags of a run, and what they mean to a plain training.

    Sums of losses are divided by 1 or 8 pictures a step. Powers of two are exact, so that the order of multiplying
    makes no difference, and nothing in the comparison needs a tolerance.
    """

    flags: tuple[str, ...]
    shape: BatchShape
    num_steps: int = 1
    noise: PlainNoise = field(default_factory=PlainNoise)
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW
    arguments: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 0.0
    precision: dict[str, Any] = field(default_factory=dict)


ONE_BY_ONE = BatchShape(batch_size=1)
FOUR_BATCHES = BatchShape(batch_size=3, accumulation_steps=4)  # of 3, 1, 3 and 1 pictures, from two buckets
CASES = {
    "one picture a step, AdamW": Case(("--optimizer_type=AdamW",), ONE_BY_ONE, num_steps=2),
    "two buckets in a step, special noise, Adafactor, checkpointing, clipping": Case(
        (*ADAFACTOR_FLAGS, *NOISE_FLAGS, "--gradient_checkpointing", "--max_grad_norm=0.5"),
        FOUR_BATCHES,
        noise=NOISE,
        optimizer=Adafactor,
        arguments=ADAFACTOR,
        max_grad_norm=0.5,
    ),
    "text encoders too": Case(
        ("--optimizer_type=AdamW", "--train_text_encoder"),
        ONE_BY_ONE,
        precision={"trained": ("unet", "text_encoder_l", "text_encoder_g")},
    ),
    "velocity with zero terminal SNR and min-SNR weights": Case(
        ("--optimizer_type=AdamW", "--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma=5"),
        ONE_BY_ONE,
        precision={"velocity": True, "min_snr_gamma": 5.0},
    ),
    "weights in float32, computed in bfloat16": Case(
        ("--optimizer_type=AdamW", "--mixed_precision=bf16", "--gradient_checkpointing"),
        ONE_BY_ONE,
        precision={"computes_in": torch.bfloat16},
    ),
    "all in bfloat16": Case(
        (*ADAFACTOR_FLAGS, *NOISE_FLAGS, "--mixed_precision=bf16", "--full_bf16", "--bf16_rounding=nearest"),
        FOUR_BATCHES,
        noise=NOISE,
        optimizer=Adafactor,
        arguments=ADAFACTOR,
        precision={"computes_in": torch.bfloat16, "held_in": torch.bfloat16},
    ),
}


@dataclass(frozen=True)
class Step:
    """What a step did, by network and parameter; gradients as they were before they were clipped."""

    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def gradients_of(networks: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """A copy of every gradient that there is."""
    return {
        f"{part}.{name}": parameter.grad.clone()
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def weights_of(networks: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {
        f"{part}.{name}": tensor.clone()
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps of a run of sdxl_train.py, which goes as ever."""
    steps: list[Step] = []
    original = Learner.step

    def recording(self, step):
        gradients = gradients_of(self.trained)
        report = original(self, step)
        steps.append(Step(gradients, weights_of(self.trained)))
        return report

    monkeypatch.setattr(Learner, "step", recording)
    return steps


def assert_equal(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """Every number the same, to the last bit."""
    assert ours.keys() == plain.keys()
    different = [name for name, tensor in plain.items() if not torch.equal(ours[name], tensor)]
    assert different == []


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_is_that_of_a_plain_training_bit_for_bit(
    case: Case, train, recorded: list[Step], two_buckets: PreparedSet, diffusers_model
):
    run = train(
        *(f"--in_json={two_buckets.latents_json}", f"--train_data_dir={two_buckets.images}", f"--seed={SEED}"),
        *(f"--train_batch_size={case.shape.batch_size}", f"--max_train_steps={case.num_steps}"),
        *(f"--gradient_accumulation_steps={case.shape.accumulation_steps}", f"--learning_rate={RATE}", *case.flags),
    )
    plain = PlainTraining(diffusers_model, two_buckets, case.noise, **case.precision)
    parameters = [parameter for network in plain.trained.values() for parameter in network.parameters()]
    optimizer = case.optimizer(parameters, lr=RATE, **case.arguments)
    losses = []
    for number, batches in enumerate(batches_of_steps(two_buckets, case.shape, SEED)[: case.num_steps], start=1):
        losses.append(plain.backward(batches, SEED))
        assert_equal(recorded[number - 1].gradients, gradients_of(plain.trained))
        if case.max_grad_norm:
            assert clip_grad_norm_(parameters, case.max_grad_norm) > 2 * case.max_grad_norm
        optimizer.step()
        optimizer.zero_grad()
        assert_equal(recorded[number - 1].weights, weights_of(plain.trained))
    assert len(recorded) == case.num_steps
    assert run.logged("loss/current") == losses


def test_the_steps_compared_have_batches_of_two_buckets_and_of_two_sizes(two_buckets: PreparedSet):
    [batches] = batches_of_steps(two_buckets, FOUR_BATCHES, SEED)
    assert sorted((len(keys), keys[0].split()[-1]) for keys in batches) == [
        *((1, "strip"), (1, "whole"), (3, "strip"), (3, "whole"))
    ]
