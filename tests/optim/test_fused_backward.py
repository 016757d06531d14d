"""Stepping in the backward pass leads to the same weights as stepping after it, to the last bit."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.optim.fused_backward import FusedBackward
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from tests.optim.small_net import SmallNet, images_of, take_steps

RECIPE = ADAFACTOR_RECIPE.split()[1:]


def assert_same_weights(one, other) -> None:
    weights, others = one.weights(), other.weights()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])] == []


def test_the_trainer_saves_the_same_model(train):
    flags = ("--optimizer_type=AdamW", "--learning_rate=1e-3", "--max_grad_norm=0.05", "--gradient_checkpointing")
    usual, fused = train(*flags), train(*flags, "--fused_backward_pass", "--offload_optimizer")
    assert usual.logged("grad_norm") == fused.logged("grad_norm"), "and has clipped each step"
    assert all(norm > 0.05 for norm in fused.logged("grad_norm"))
    assert_same_weights(usual, fused)


@pytest.mark.slow  # the same without text encoders is not
def test_the_trainer_saves_the_same_model_in_the_recipe_with_text_encoders(train):
    flags = (
        *("--full_bf16", "--mixed_precision=bf16", "--optimizer_type=Adafactor", "--optimizer_args", *RECIPE),
        *("--learning_rate=1e-3", "--train_text_encoder"),
    )
    usual, fused = train(*flags), train(*flags, "--fused_backward_pass")
    assert_same_weights(usual, fused)


class Net(SmallNet):
    """Convolution, linear layers, a parameter used twice, and one that is never used."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.to(dtype)


def trained(options: OptimizerOptions, *, fused: bool, dtype: torch.dtype, rounding: str, chunk: int) -> Net:
    net = Net(dtype)
    take_steps(net, images_of(range(1, 5), dtype), options, rounding, fused=fused, chunk=chunk)
    return net


@pytest.mark.parametrize("optimizer_type", ["AdamW", "Adafactor", "Lion", "AdamWScheduleFree", "torch.optim.RMSprop"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
@pytest.mark.parametrize("chunk", [1, 150, 10**9])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, NEAREST), (torch.bfloat16, STOCHASTIC)], ids=str)
def test_every_optimizer_moves_the_weights_to_the_same_bits(optimizer_type, max_grad_norm, chunk, dtype, rounding):
    options = OptimizerOptions(
        optimizer_type=optimizer_type,
        optimizer_args=RECIPE if optimizer_type == "Adafactor" else [],
        learning_rate=1e-2,
        max_grad_norm=max_grad_norm,
    )
    settings = {"dtype": dtype, "rounding": rounding}
    usual = trained(options, fused=False, chunk=10**9, **settings)
    fused = trained(options, fused=True, chunk=chunk, **settings)
    assert not torch.equal(usual.first.weight, Net(dtype).first.weight), "the weights have moved"
    for one, other in zip(usual.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_moves_nothing(max_grad_norm: float, bad: float):
    net = Net(torch.float32)
    options = OptimizerOptions(learning_rate=1e-2)
    optimizer = make_optimizer([{"name": "net", "params": list(net.parameters()), "lr": 1e-2}], options)
    fused = FusedBackward(Stepper(optimizer, Rounder(NEAREST, net.parameters(), 0)), max_grad_norm)
    loss = net(torch.zeros(1, 3, 6, 6)).mean() * bad
    assert fused.backward(Accelerator(cpu=True), loss, 1) is None
    untouched = Net(torch.float32).parameters()
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), untouched, strict=True))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_loss_is_read_once_and_not_before_the_backward_pass_has_begun(max_grad_norm: float):
    net, order = Net(torch.float32), []
    optimizer = make_optimizer([{"name": "net", "params": list(net.parameters()), "lr": 1e-2}], OptimizerOptions())
    fused = FusedBackward(Stepper(optimizer, Rounder(NEAREST, net.parameters(), 0)), max_grad_norm)
    predicted = net(torch.ones(1, 3, 6, 6))
    predicted.register_hook(lambda gradient: order.append("backward"))
    fused.backward(Accelerator(cpu=True), predicted.mean(), 1, lambda: order.append("read") or 1.0)
    assert [each for each in order if each == "read"] == ["read"]
    assert order[0] == "backward"
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_overflow_of_the_gradient_alone_moves_nothing_where_the_norm_is_taken():
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([{"name": "net", "params": [weight], "lr": 1.0}], OptimizerOptions())
    fused = FusedBackward(Stepper(optimizer, Rounder(NEAREST, [weight], 0)), max_grad_norm=1.0)
    loss = (weight - 1).sqrt().sum()  # 0, with an infinite slope
    assert fused.backward(Accelerator(cpu=True), loss, 1) == float("inf")
    assert weight.tolist() == [1.0]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--gradient_accumulation_steps=2",), "cannot accumulate gradients over 2"),
    ],
)
def test_what_cannot_be_fused_is_refused_with_the_reason(flags, problem, train, capsys):
    with pytest.raises(AssertionError):
        train("--fused_backward_pass", *flags)
    assert problem in capsys.readouterr().err
