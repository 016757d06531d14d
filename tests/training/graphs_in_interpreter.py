"""Run by test_step_graphs.py with TRITON_INTERPRET=1: steps replayed by graphs that run on the CPU.

A stand-in for a CUDA graph: while it is captured nothing runs, tensors that are made hold NaN, and reading a number is
an error. What is replayed has the addresses and numbers of the capture, as on a GPU.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint

from library.config.errors import UserError
from library.optim import adafactor, chunked_adafactor, triton_launches
from library.optim.chunked_adafactor import ChunkedSteps
from library.optim.fused_backward import FusedBackward
from library.optim.options import STOCHASTIC
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.training import step_graphs
from library.training.step_graphs import StepGraphs
from tests.optim.small_net import SmallNet

aten = torch.ops.aten
ALIASES = {aten._unsafe_view.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}


class Captured(TorchDispatchMode):
    """What was launched while this mode was on."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        if function.is_view or function in ALIASES:
            return function(*arguments, **named)
        if function._schema.is_mutable:
            self.launched.append((function, arguments, named, None))
            return named.get("out", arguments[0] if function._schema.returns else None)
        made = tree_map(_unknown, function(*arguments, **named))  # which changes nothing, and says the strides
        self.launched.append((function, arguments, named, made))
        return made

    def replay(self):
        with torch.no_grad():
            for function, arguments, named, made in self.launched:
                result = function(*arguments, **named)
                if made is not None:
                    for place, value in zip(tree_flatten(made)[0], tree_flatten(result)[0], strict=True):
                        if isinstance(place, torch.Tensor):
                            place.data.copy_(value)  # as by a graph, of which autograd knows nothing


def _unknown(value):
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.fill_(float("nan")) if is_number else value


class Capturing:
    """Captures on the CPU, programs of Triton as well; counts its graphs."""

    current = None
    """The graph that is captured now, by any of these."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, function):
        self.num_graphs += 1
        with Captured() as graph:
            Capturing.current = graph
            try:
                result = function()
            finally:
                Capturing.current = None
        return graph, result


_launch = triton_launches.launch


def launch(program, num_programs, *arguments, **constants):
    if Capturing.current is None:
        _launch(program, num_programs, *arguments, **constants)
    else:
        Capturing.current.launched.append((_launch, (program, num_programs, *arguments), constants, None))


class Net(SmallNet):
    """The small net, a part of which is computed again in the backward pass."""

    def forward(self, images, scale):
        features = self.first(self.convolution(images).mean(dim=(2, 3)).relu())
        inner = checkpoint(self.twice, features, use_reentrant=False, preserve_rng_state=False)
        return self.twice(inner.relu()) * scale


def batch_of(step):
    size = 6 if step % 3 else 8  # of two shapes
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 3, size, size, generator=generator).bfloat16(), torch.rand(
        2, 1, generator=generator
    ).bfloat16()


def trained(num_steps, capture=None, *, bad_step=None, watch=lambda graphs: None):
    """The weights, and the optimizer's state, after so many steps with another rate in each."""
    net, accelerator = Net().bfloat16(), Accelerator(cpu=True)
    parameters = list(net.parameters())
    optimizer = adafactor.Adafactor(
        parameters, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.01, clip_threshold=0.7
    )
    optimizer.chunked = ChunkedSteps(with_triton=True)
    stepper = Stepper(optimizer, Rounder(STOCHASTIC, parameters, seed=5), elements_per_chunk=150)
    fused = FusedBackward(stepper, max_grad_norm=0.0)
    graphs = None
    if capture is not None:
        graphs = StepGraphs(net, fused, stepper, accelerator, capture=capture, is_exact=True)
    for step in range(1, num_steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-2 / step
        inputs = batch_of(step)
        predicted = net(*inputs) if graphs is None else graphs.predict(*inputs)
        loss = predicted.float().square().mean() * (float("nan") if step == bad_step else 1.0)
        if graphs is None:
            fused.backward(accelerator, loss, step)
        else:
            graphs.backward(loss, step)
            watch(graphs)
        if step == bad_step:
            fused.take_back_step()
        assert all(parameter.grad is None for parameter in parameters)
    return parameters, [optimizer.state[each] for each in parameters]


def assert_same(one, other):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]


@contextmanager
def on_this_gpu():
    """Adafactor takes its weights for those of a GPU, and launches are captured."""
    may = patch.object(adafactor, "may_step_together", lambda group: True)
    can = patch.object(chunked_adafactor, "may_step_together", lambda group: True)
    with may, can, patch.object(triton_launches, "launch", launch):
        yield


def refused(capture, **named):
    try:
        trained(9, capture, **named)
    except UserError as error:
        return str(error)
    raise AssertionError("a graph with old numbers was not noticed")


advance = ChunkedSteps.advance


def with_old_seeds(self, held, group_of, state, rounder):
    rounder.start(1)
    advance(self, held, group_of, state, rounder)


def with_old_rates(self, held, group_of, state, rounder):
    advance(self, held, {each: {**group, "lr": 1e-2} for each, group in group_of.items()}, state, rounder)


capture = Capturing()
with on_this_gpu():
    usual = trained(12)
    assert_same(trained(12, capture), usual)
    assert capture.num_graphs == 4, "two for each of two shapes"
    print("replayed steps are the same bit for bit", flush=True)
    for bad_step in (4, 10):  # of which one would be compared
        assert_same(trained(12, Capturing(), bad_step=bad_step), trained(12, bad_step=bad_step))
    print("a loss that is not finite changes nothing in a replay", flush=True)
    for old in (with_old_seeds, with_old_rates):
        with patch.object(ChunkedSteps, "advance", old):
            assert "differs from the same step without it (the weights" in refused(Capturing())
    with patch.object(step_graphs.StepGraphs, "_replay_forward", lambda self, shape: shape.forward.replay()):
        assert "(the prediction)" in refused(Capturing())
    print("old seeds, rates and batches are noticed", flush=True)
    with patch.object(step_graphs, "MAX_GRAPHS", 1):
        limited = Capturing()
        assert_same(trained(12, limited), usual)
        assert limited.num_graphs == 2
    print("shapes beyond the limit are stepped as usual", flush=True)
    with patch.object(
        nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight) * float(x.sum() < 9e9)
    ):
        assert "cannot be captured (operation not permitted" in refused(Capturing())
    print("what waits for the GPU cannot be captured", flush=True)
