"""Steps replayed as CUDA graphs: for each shape of a batch one for the forward pass and one for all that follows it.

A graph replays what it was captured with: addresses, and every number that Python has passed. What changes from step to
step (the batch, rates, decay, seeds, whether the loss is finite) is therefore copied to places on the device before
each replay. Whether nothing was overlooked shows only on the GPU itself: the first replay of each shape takes the same
step as the usual kernels have just taken, from the same weights, and the run ends if both do not lead to the same ones.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from library.config.errors import UserError
from library.optim import triton_launches
from library.optim.chunked_adafactor import HeldChunk, are_where_they_were
from library.optim.fused_backward import FusedBackward
from library.optim.options import ADAFACTOR_RECIPE
from library.optim.stepping import Stepper
from library.training.step_comparison import StepComparison

log = logging.getLogger(__name__)

MAX_GRAPHS = 16
"""Shapes of batches that have graphs; further ones are stepped as without."""

Result = TypeVar("Result")


class Replayed(Protocol):
    """What can be replayed."""

    def replay(self) -> None:
        """Launch everything again."""


Capture = Callable[[Callable[[], Any]], tuple[Replayed, Any]]
"""Calls a function, of which nothing runs, and returns its graph and its result, whose memory the graph will fill."""


def make_step_graphs(
    network: Callable[..., Tensor],
    fused: FusedBackward | None,
    stepper: Stepper,
    accelerator: Accelerator,
    *,
    is_exact: bool,
) -> "StepGraphs":
    """Return the graphs of `--cuda_graphs`. Raise `UserError` where there can be none."""
    if accelerator.device.type != "cuda":
        raise UserError("--cuda_graphs needs a GPU, and this run trains on the CPU.", "Leave it out.")
    if fused is None or not stepper.decides_on_device:
        raise UserError(
            "--cuda_graphs needs an optimizer that decides on the GPU.", f"Pass {ADAFACTOR_RECIPE} to Adafactor."
        )
    if not triton_launches.has_triton():
        raise UserError("--cuda_graphs needs Triton, which cannot be used here.", "Install it, or leave the flag out.")
    return StepGraphs(network, fused, stepper, accelerator, capture=capture_on_gpu(), is_exact=is_exact)


def capture_on_gpu() -> Capture:
    """Return what captures on the GPU; all graphs share the memory of their temporaries."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Any]) -> tuple[Replayed, Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that fetches batches, may go on.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
        return graph, result

    return capture


@dataclass
class _Shape:
    """What is kept for the batches of one shape."""

    num_visits: int = 0
    inputs: Sequence[Tensor] = ()
    predicted: Tensor | None = None
    gradient: Tensor | None = None
    forward: Replayed | None = None
    rest: Replayed | None = None
    held: Sequence[HeldChunk] = field(default_factory=list)
    is_compared: bool = False


class StepGraphs:
    """Forward passes and steps of a network whose weights a `FusedBackward` updates, replayed where they can be.

    Of each shape the first step runs as usual, the second is captured, the third compared. `is_exact` says that the
    kernels repeat, so that both have to be equal bit for bit.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        fused: FusedBackward,
        stepper: Stepper,
        accelerator: Accelerator,
        *,
        capture: Capture,
        is_exact: bool,
    ):
        self._network = network
        self._fused = fused
        self._stepper = stepper
        self._accelerator = accelerator
        self._capture = capture
        self._is_exact = is_exact
        self._shapes: dict[Hashable, _Shape] = {}
        self._is_finite = torch.ones((), dtype=torch.int32, device=accelerator.device)
        self._has_told_limit = False
        self._shape: _Shape | None = None
        self._inputs: Sequence[Tensor] = ()
        self._with_gradient: Tensor | None = None
        self._leaf: Tensor | None = None

    def predict(self, *inputs: Tensor) -> Tensor:
        """Return the network's prediction for a batch; its gradient is what `backward` goes on with."""
        self._inputs, self._shape = inputs, self._shape_of(inputs)
        shape = self._shape
        if shape is not None and shape.forward is not None and self._has_moved(shape):
            self._shapes.clear()
            self._shape = shape = self._shape_of(inputs)
        if shape is None or shape.num_visits == 1 or (shape.forward is not None and not shape.is_compared):
            self._with_gradient = self._network(*inputs)
        elif shape.forward is None:
            shape.inputs = [each.clone() for each in inputs]
            shape.forward, predicted = self._captured(lambda: self._network(*shape.inputs))
            self._with_gradient, shape.predicted = predicted, predicted.detach()
            shape.forward.replay()
        else:
            self._replay_forward(shape)
            self._with_gradient = shape.predicted
        assert self._with_gradient is not None
        self._leaf = self._with_gradient.detach().requires_grad_()
        return self._leaf

    def backward(self, loss: Tensor, step: int) -> None:
        """Take optimizer step `step` for the loss of what was predicted."""
        assert self._leaf is not None and self._with_gradient is not None
        self._accelerator.backward(loss)
        gradient, shape, predicted = self._leaf.grad, self._shape, self._with_gradient
        assert gradient is not None
        self._is_finite.copy_(loss.detach().isfinite())
        self._leaf = self._with_gradient = None
        if shape is None or shape.num_visits == 1:
            self._step_as_usual(predicted, gradient, step)
        elif shape.rest is None:
            self._capture_rest(shape, predicted, gradient, step).replay()
        elif not shape.is_compared:
            self._compare(shape, predicted, gradient, step)
        else:
            self._replay_rest(shape, gradient, step)

    def _shape_of(self, inputs: Sequence[Tensor]) -> _Shape | None:
        """Return what is kept for batches of this shape, None if there are too many shapes."""
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key not in self._shapes and len(self._shapes) == MAX_GRAPHS:
            if not self._has_told_limit:
                self._has_told_limit = True
                log.warning(
                    "--cuda_graphs: batches have more than %d shapes; those of further ones, the first of them "
                    "%s, are stepped without a graph, with the same result",
                    *(MAX_GRAPHS, list(inputs[0].shape)),
                )
            return None
        shape = self._shapes.setdefault(key, _Shape())
        shape.num_visits += 1
        return shape

    def _has_moved(self, shape: _Shape) -> bool:
        return bool(shape.held) and not are_where_they_were(shape.held, self._stepper.states)

    def _step_as_usual(self, predicted: Tensor, gradient: Tensor, step: int) -> None:
        self._fused.step_on_device(lambda: predicted.backward(gradient), self._is_finite, step)

    def _replay_forward(self, shape: _Shape) -> None:
        assert shape.forward is not None
        for place, each in zip(shape.inputs, self._inputs, strict=True):
            place.copy_(each)
        shape.forward.replay()

    def _replay_rest(self, shape: _Shape, gradient: Tensor, step: int) -> None:
        assert shape.rest is not None and shape.gradient is not None
        shape.gradient.copy_(gradient)
        self._stepper.advance(step, shape.held)
        shape.rest.replay()

    def _captured(self, function: Callable[[], Result]) -> tuple[Replayed, Result]:
        try:
            return self._capture(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--cuda_graphs: this step cannot be captured ({reason}).", _REMEDY) from error

    def _capture_rest(self, shape: _Shape, predicted: Tensor, gradient: Tensor, step: int) -> Replayed:
        shape.gradient = place = gradient.clone()
        with self._stepper.holding(gradient.device) as held:
            rest, _ = self._captured(lambda: self._step_as_usual(predicted, place, step))
        shape.rest, shape.held = rest, held
        return rest

    def _compare(self, shape: _Shape, predicted: Tensor, gradient: Tensor, step: int) -> None:
        """Take the step as usual, and again by the graphs; raise `UserError` if they lead to different weights.

        A step that moves nothing, for its rate or its loss, could not tell: the next one is compared.
        """
        if not self._is_finite:
            self._step_as_usual(predicted, gradient, step)
            return
        parameters: list[Parameter] = [each for chunk in shape.held for each in chunk.parameters]
        comparison = StepComparison(parameters, self._stepper.states)
        usual = predicted.detach().clone()
        self._step_as_usual(predicted, gradient, step)
        if not comparison.has_moved():
            return
        comparison.keep_and_put_back()
        self._replay_forward(shape)
        assert shape.predicted is not None
        is_same = comparison.is_near(usual, shape.predicted, is_exact=self._is_exact)
        self._replay_rest(shape, gradient, step)
        difference = comparison.difference(is_exact=self._is_exact)
        if not is_same or difference is not None:
            what = difference if is_same else "the prediction"
            raise UserError(f"--cuda_graphs: a replayed step differs from the same step without it ({what}).", _REMEDY)
        shape.is_compared = True
        log.info("--cuda_graphs: batches of shape %s are replayed, as compared", list(shape.inputs[0].shape))


_REMEDY = "Leave out --cuda_graphs, and report this with the GPU, the driver and the release of torch."
