"""Adafactor against the class of transformers that it replaces."""

import pytest
import torch
import transformers
from torch.nn import Parameter

from library.config.errors import UserError
from library.optim.adafactor import Adafactor
from library.optim.kernels import why_not_compiled
from library.optim.options import KAHAN, NEAREST, STOCHASTIC
from library.optim.rounding import Rounder, stochastically_rounded

AT_A_GIVEN_RATE = {"lr": 1e-3, "relative_step": False, "warmup_init": False}
SHAPES = ((40, 24), (7,), (6, 5, 3, 3), (4, 6, 1, 1), (1,))
LARGE = (520, 260)  # above the size at which it is compiled


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def after_steps(optimizer_class, shape, *, dtype=torch.float32, rounding=NEAREST, num_steps=4, large=1.0, **settings):
    """A parameter after some steps of an optimizer over it alone, and the optimizer."""
    parameter = Parameter(draw(shape, 0, dtype))
    optimizer = optimizer_class([parameter], **AT_A_GIVEN_RATE, **settings)
    rounder = Rounder(rounding, [parameter], seed=3)
    if isinstance(optimizer, Adafactor):
        optimizer.rounder = rounder
    for step in range(1, num_steps + 1):
        rounder.start(step)
        parameter.grad = draw(shape, step, dtype) * large**step
        optimizer.step()
    return parameter.detach(), optimizer


SETTINGS = {
    "recipe": {"scale_parameter": False, "weight_decay": 0.01},
    "first moment": {"scale_parameter": True, "beta1": 0.9, "clip_threshold": 0.5, "large": 3.0},
    "decay rate": {"scale_parameter": False, "decay_rate": -0.5, "eps": (1e-3, 1e-2)},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_transformers_to_the_last_bit(shape, settings, dtype):
    ours, _ = after_steps(Adafactor, shape, dtype=dtype, **settings)
    theirs, _ = after_steps(transformers.Adafactor, shape, dtype=dtype, **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_compiled_steps_are_those_of_transformers(settings):
    ours, _ = after_steps(Adafactor, LARGE, **settings)
    theirs, _ = after_steps(transformers.Adafactor, LARGE, **settings)
    # Means over rows, columns and the whole tensor are summed in another order: a few units in the last place.
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_its_state_is_that_of_transformers_and_float32():
    for shape in SHAPES:
        _, ours = after_steps(Adafactor, shape, scale_parameter=False, dtype=torch.bfloat16)
        _, theirs = after_steps(transformers.Adafactor, shape, scale_parameter=False, dtype=torch.bfloat16)
        [state], [expected] = ours.state.values(), theirs.state.values()
        expected.pop("RMS")  # the weights' size, which transformers keeps and never reads again
        assert {key: getattr(value, "shape", value) for key, value in state.items()} == {
            key: getattr(value, "shape", value) for key, value in expected.items()
        }
        assert {value.dtype for value in state.values() if isinstance(value, torch.Tensor)} == {torch.float32}


def test_a_flattened_convolution_moves_as_the_matrix_that_it_is_and_keeps_little():
    shape, matrix = (6, 5, 3, 3), (6, 45)
    ours, optimizer = after_steps(Adafactor, shape, scale_parameter=False, flatten_convolutions=True)
    theirs = Parameter(draw(shape, 0).view(matrix))
    reference = transformers.Adafactor([theirs], scale_parameter=False, **AT_A_GIVEN_RATE)
    for step in range(1, 5):
        theirs.grad = draw(shape, step).view(matrix)
        reference.step()
    torch.testing.assert_close(ours.view(matrix), theirs.detach(), rtol=2e-6, atol=2e-7)  # order of sums, as above
    [state] = optimizer.state.values()
    assert state["exp_avg_sq_row"].numel() + state["exp_avg_sq_col"].numel() == 6 + 45


@pytest.mark.parametrize("shape", [(40, 24), (6, 5, 3, 3), LARGE], ids=str)
def test_stochastic_rounding_in_the_kernel_is_the_float32_step_rounded(shape):
    settings = {"scale_parameter": False, "weight_decay": 0.01, "num_steps": 1}
    exact = Parameter(draw(shape, 0, torch.bfloat16).float())
    reference = Adafactor([exact], **AT_A_GIVEN_RATE, scale_parameter=False, weight_decay=0.01)
    exact.grad = draw(shape, 1, torch.bfloat16).float()
    reference.step()
    rounder = Rounder(STOCHASTIC, [exact], seed=3)
    rounder.start(1)
    ours, _ = after_steps(Adafactor, shape, dtype=torch.bfloat16, rounding=STOCHASTIC, **settings)
    same = ours == stochastically_rounded(exact.detach(), rounder.seed(exact))
    # Compiled for two precisions, sums have two orders: one in 65536 roundings turns on the last bit of a float32.
    assert same.all() if shape != LARGE else same.float().mean() > 0.999


@pytest.mark.parametrize("shape", [(40, 24), LARGE], ids=str)
def test_compensated_bfloat16_follows_float32(shape):
    start = draw(shape, 0, torch.bfloat16)
    exact = Parameter(start.float())
    reference = transformers.Adafactor([exact], scale_parameter=False, **AT_A_GIVEN_RATE)
    for step in range(1, 21):
        exact.grad = draw(shape, step, torch.bfloat16).float()
        reference.step()
    ours, optimizer = after_steps(
        Adafactor, shape, dtype=torch.bfloat16, rounding=KAHAN, num_steps=20, scale_parameter=False
    )
    [state] = optimizer.state.values()
    # Each of 20 steps leaves out less than 2**-17 of the weight.
    torch.testing.assert_close(ours.float() + state["rounding_residual"], exact.detach(), rtol=20 * 2**-17, atol=2e-6)


@pytest.mark.parametrize("rounding", [STOCHASTIC, KAHAN])
def test_weights_in_another_memory_format_move_to_the_same_bits(rounding):
    shape = (6, 5, 3, 3)
    usual, other = (Parameter(draw(shape, 0, torch.bfloat16)) for _ in range(2))
    other.data = other.data.to(memory_format=torch.channels_last)
    for parameter in (usual, other):
        optimizer = Adafactor([parameter], **AT_A_GIVEN_RATE, scale_parameter=False)
        optimizer.rounder = Rounder(rounding, [parameter], seed=3)
        for step in range(1, 4):
            optimizer.rounder.start(step)
            parameter.grad = torch.empty_like(parameter).copy_(draw(shape, step, torch.bfloat16))
            optimizer.step()
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(usual, other)


def test_a_warm_up_of_relative_steps_needs_them():
    with pytest.raises(ValueError, match="relative_step"):
        Adafactor([Parameter(torch.zeros(2))], lr=1e-3, relative_step=False, warmup_init=True)


def test_a_state_with_convolutions_factored_differently_is_refused():
    _, optimizer = after_steps(Adafactor, (6, 5, 3, 3), scale_parameter=False)
    optimizer.param_groups[0]["flatten_convolutions"] = True
    with pytest.raises(UserError, match="flatten_convolutions"):
        optimizer.step()


def test_without_a_compiler_it_takes_the_same_steps_and_says_so_once(no_compiler, capsys):
    settings = {"scale_parameter": False, "weight_decay": 0.01, "num_steps": 2}
    ours, _ = after_steps(Adafactor, LARGE, **settings)
    theirs, _ = after_steps(transformers.Adafactor, LARGE, **settings)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)  # order of sums, as above
    said = capsys.readouterr().err
    reason = why_not_compiled("cpu")
    assert reason is not None
    assert said.count(f"torch.compile does not work here ({reason})") == 1
    assert "C++ compiler" in said


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("dtype", "rounding", "more"),
    [(torch.float32, None, {"beta1": 0.9}), (torch.bfloat16, STOCHASTIC, {}), (torch.bfloat16, KAHAN, {})],
    ids=["float32 with momentum", "stochastic", "kahan"],
)
def test_a_hundred_learning_rates_compile_nothing_after_the_second_step(dtype, rounding, more):
    parameters = [torch.nn.Parameter(torch.ones(512, 257, dtype=dtype))]
    adafactor = Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False, weight_decay=0.01, **more)
    adafactor.rounder = None if rounding is None else Rounder(rounding, parameters, seed=1)
    num_compiled = []
    for step in range(100):
        adafactor.param_groups[0]["lr"] = 1e-3 / (1 + step)
        if adafactor.rounder is not None:
            adafactor.rounder.start(step)
        parameters[0].grad = torch.full_like(parameters[0], 0.1)
        adafactor.step()
        num_compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_compiled[1] > 0
    assert num_compiled[-1] == num_compiled[1]
