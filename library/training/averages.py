"""Moving averages of what is trained: updated after steps, part of states, drawn, validated and saved."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from library.config.errors import listed
from library.optim.ema import MovingAverage
from library.optim.ema_options import EMA, EmaOptions
from library.training.failures import explained_out_of_memory
from library.training.learner import Learner, StepReport
from library.training.plan import Occasion
from library.training.progress import Progress
from library.training.run_options import TrainingOptions
from library.training.sharding import Shards

log = logging.getLogger(__name__)


def make_averages(options: TrainingOptions, learner: Learner, progress: Progress) -> "Averages":
    """Return the moving averages that the options ask for, which may be none."""
    networks = learner.resumable().networks
    device, shards = learner.accelerator.device, learner.shards
    return Averages(options.ema, networks, learner.parameters, device=device, seed=progress.seed, shards=shards)


class Averages:
    """The moving averages of `trained` parameters of `networks`, kept alike in every process.

    A step that updated nothing counts as a step with the same weights, and so do the steps after a network is frozen:
    its average goes on towards the weights that it keeps. With `shards`, each process has the average of its part.

    `on_snapshot(step)` is called where snapshots are due, in every process.
    """

    def __init__(
        self,
        options: EmaOptions,
        networks: Mapping[str, nn.Module],
        trained: Collection[Parameter],
        *,
        device: torch.device,
        seed: int,
        shards: Shards | None = None,
    ):
        chosen = set(map(id, trained))
        held = {
            f"{part}.{name}": parameter if shards is None else shards.of(parameter)
            for part, network in networks.items()
            for name, parameter in network.named_parameters()
        }
        weights = {name: parameter for name, parameter in held.items() if id(parameter) in chosen}
        self._weights, self._shards = list(weights.values()), shards
        self._options = options
        self._parts = {id(network): part for part, network in networks.items()}
        self._places = {name: place for place, name in enumerate(weights)}
        place = device if options.ema_device == "gpu" else torch.device("cpu")
        firsts = None if shards is None else [shards.first_element(each) for each in self._weights]
        make = partial(MovingAverage, self._weights, dtype=options.dtype, device=place, first_elements=firsts)
        with explained_out_of_memory("while the moving averages are made (--ema_device=cpu keeps them elsewhere)"):
            self._averages = {
                name: make(profile=profile, seed=f"{seed}/{name}") for name, profile in options.profiles.items()
            }
        self._waiting = set(self._averages)  # those that have not begun
        self.on_snapshot: Callable[[int], None] = lambda step: None

    def __bool__(self) -> bool:
        return bool(self._averages)

    @property
    def num_bytes(self) -> int:
        """The bytes of all averages."""
        return sum(value.nbytes for average in self._averages.values() for value in average.values)

    def begin(self, step: int) -> None:
        """Begin every average that no state has brought with the weights after `step`."""
        for name in self._waiting:
            self._averages[name].begin(step)
        self._waiting = set()

    def after_step(self, occasion: Occasion, report: StepReport | None) -> None:
        """Update the averages where that is due, and let snapshots be saved where these are."""
        if report is None or not self._averages:  # the run begins
            return
        every = self._options.ema_snapshot_every_n_steps
        saves = every is not None and (occasion.step % every == 0 or occasion.is_last)
        if saves or occasion.is_last or occasion.step % self._options.ema_every == 0:
            for average in self._averages.values():
                average.update(occasion.step)
        if saves:
            self.on_snapshot(occasion.step)

    def weight_sets(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Return what puts the average of --ema, if there is one, in the place of the weights within a block."""
        return {EMA: self._averages[EMA].lent} if EMA in self._averages else {}

    def replacing(self, network: nn.Module, name: str) -> torch.Tensor | None:
        """Return the average of --ema of a network's tensor, None if that is not trained."""
        place = self._places.get(f"{self._parts.get(id(network))}.{name}")
        return None if place is None else self._value(EMA, place)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return an average by the names of networks and parameters: "unet.conv_in.weight"."""
        return dict(zip(self._places, self._values(name), strict=True))

    def _values(self, name: str) -> Sequence[torch.Tensor]:
        """Return an average, as tensors of all processes where each has a part."""
        return [self._value(name, place) for place in range(len(self._weights))]

    def _value(self, name: str, place: int) -> torch.Tensor:
        value = self._averages[name].values[place]
        return value if self._shards is None else self._shards.spread(value, self._weights[place])

    def begun(self, name: str) -> int:
        """Return the step whose weights an average began with."""
        return self._averages[name].begun

    def state_dict(self) -> dict[str, Any]:
        """Return what a state keeps."""
        averages = {
            name: {"begun": average.begun, "step": average.step, "values": self._values(name)}
            for name, average in self._averages.items()
        }
        return {"names": list(self._places), "averages": averages}

    def _part_of(self, saved: torch.Tensor) -> torch.Tensor:
        """Return what this process keeps of a tensor that was saved."""
        return saved if self._shards is None else self._shards.part(saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the averages of a state, and name those that it lacks or that this run does not keep.

        Raise `ValueError` for averages of other weights.
        """
        if state_dict["names"] != list(self._places):
            raise ValueError("the averages are of other weights")
        saved = state_dict["averages"]
        for name, average in self._averages.items():
            if name in saved:
                _take_over(average, saved[name], self._part_of)
                self._waiting.discard(name)
        missing, dropped = self._averages.keys() - saved.keys(), saved.keys() - self._averages.keys()
        if missing:
            log.warning(
                "the state holds no average %s: it begins with the weights of the state", listed(sorted(missing))
            )
        if dropped:
            log.warning("the average %s of the state is not continued", listed(sorted(dropped)))


def _take_over(
    average: MovingAverage, saved: Mapping[str, Any], part_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for value, whole in zip(average.values, saved["values"], strict=True):
        kept = part_of(whole)
        if value.shape != kept.shape:
            raise ValueError(f"an average of the shape {list(kept.shape)} for weights of {list(value.shape)}")
        value.copy_(kept)
    average.begun, average.step = int(saved["begun"]), int(saved["step"])
