"""Weights sharded over processes by PyTorch's FSDP2, whose shards an optimizer sees as plain parameters."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_

from library.sdxl.tensor_file import Replacing
from library.training.process_options import UNITS, num_copies, reshards

COPIES, PARTS = "copies", "parts"
"""Dimensions of the mesh of processes: over one of them weights are the same, over the other each has a part."""


class Shards:
    """The parts of the weights of `networks` that this process keeps: rows of each, as plain parameters.

    They take the places of the weights in `groups`, the parameter groups of an optimizer. The network holds the same
    memory, so that what an optimizer writes there is what is gathered next.
    """

    def __init__(self, networks: Sequence[nn.Module], groups: Sequence[dict[str, Any]], accelerator: Accelerator):
        self.accelerator = accelerator
        shape = num_copies(os.environ), dist.get_world_size() // num_copies(os.environ)
        self._mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=(COPIES, PARTS))
        self._networks = networks
        places = {id(each): place for place, each in enumerate(_parameters(networks))}
        chosen = [[places[id(each)] for each in group["params"]] for group in groups]
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")  # nothing changes it in place
        for network in networks:
            shard(network, self._mesh if shape[0] > 1 else self._mesh[PARTS])
        shards = [_shard_of(weight) for weight in _parameters(networks)]
        self._weight_of = dict(zip(shards, _parameters(networks), strict=True))
        self._shard_of = {weight: shard for shard, weight in self._weight_of.items()}
        for group, of_group in zip(groups, chosen, strict=True):
            group["params"] = [shards[place] for place in of_group]

    def of(self, weight: Parameter) -> Parameter:
        """Return the shard of a weight, as a network has it."""
        return self._shard_of[weight]

    def weight_of(self, shard: Parameter) -> Parameter:
        """Return the weight, as a network has it, that a shard is a part of."""
        return self._weight_of[shard]

    def whole_shape(self, shard: Parameter) -> torch.Size:
        """Return the shape of the weight that a shard is a part of."""
        return self._weight_of[shard].shape

    def first_element(self, shard: Parameter) -> int:
        """Return the position of the shard's first number in the weight."""
        shape = self.whole_shape(shard)
        return self._rows(shape[0]).start * (shape.numel() // max(1, shape[0]))

    def size(self, shard: Parameter) -> int:
        """Return how many numbers the largest shard of its weight has: the same in all processes."""
        shape = self.whole_shape(shard)
        return self._rows_of_each(shape[0]) * math.prod(shape[1:])

    def add_up(self, values: Tensor) -> None:
        """Add to `values`, in place, those that the processes with the other rows have."""
        dist.all_reduce(values, group=self._mesh.get_group(PARTS))

    def part(self, whole: Tensor) -> Tensor:
        """Return the rows that this process keeps of a tensor, whole or of all processes."""
        if isinstance(whole, DTensor):
            return local_part(whole)
        rows = self._rows(whole.shape[0])
        return whole[rows.start : rows.stop]

    def spread(self, part: Tensor, shard: Parameter) -> DTensor:
        """Return, as a tensor of all processes, what each keeps for its rows of a weight."""
        return self._spread(part, torch.Size((self.whole_shape(shard)[0], *part.shape[1:])))

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> DTensor:
        """Return a tensor of all processes of which each has rows, with numbers that happen to be there."""
        rows = self._rows(shape[0])
        return self._spread(torch.empty((len(rows), *shape[1:]), dtype=dtype, device=device), shape)

    def take_gradients(self) -> None:
        """Move the gradients of the networks to the shards."""
        for weight, shard in self._shard_of.items():
            gradient, weight.grad = weight.grad, None
            shard.grad = None if gradient is None else local_part(gradient)

    def on_gradient(self, shard: Parameter, call: Callable[[Parameter], None]) -> None:
        """Let `call` receive a shard whenever its gradient is complete, the mean over all processes."""

        def take(weight: Any) -> None:
            shard.grad, weight.grad = local_part(weight.grad), None
            call(shard)

        self._weight_of[shard].register_post_accumulate_grad_hook(take)

    def norms_of(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        """Return the norms of the gradients of shards."""
        return torch._foreach_norm(gradients, 2, dtype=torch.float32)

    def norm_of_all(self, norms: list[Tensor]) -> Tensor:
        """Return the norm that gradients of these norms have together with those of the other processes.

        Norms of single gradients round as those of whole ones do, so that the sum has the same bits.
        """
        squares = torch.stack(norms).square()
        self.add_up(squares)
        dtypes = {shard.dtype for shard in self._weight_of}
        together = squares.sqrt().to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
        return torch.linalg.vector_norm(together)

    def clip(self, shards: Iterable[Parameter], max_norm: float) -> float:
        """Clip the gradients to the norm that all parts of them have together; return it."""
        shards = list(shards)
        gradients = [shard.grad for shard in shards if shard.grad is not None]
        norm = self.norm_of_all(list(self.norms_of(gradients)))
        clip_grads_with_norm_(shards, max_norm, norm)
        return float(norm)

    def forget_whole(self) -> None:
        """Free the gathered weights, which are not those of the shards any more."""
        for network in self._networks:
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def shown(self, weights: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
        """Return what puts other weights in place within a block, with nothing left of those that were gathered."""

        @contextmanager
        def showing() -> Iterator[None]:
            with weights():
                self.forget_whole()
                yield
            self.forget_whole()

        return showing

    def _rows(self, num_rows: int) -> range:
        """Return which of the rows of a weight this process keeps: as many as the others, the last ones fewer."""
        each = self._rows_of_each(num_rows)
        place = self._mesh[PARTS].get_local_rank()
        return range(min(place * each, num_rows), min((place + 1) * each, num_rows))

    def _rows_of_each(self, num_rows: int) -> int:
        return -(-num_rows // self._mesh[PARTS].size())

    def _spread(self, part: Tensor, shape: torch.Size) -> DTensor:
        strides = torch.empty(shape, device="meta").stride()
        placements = [Replicate(), Shard(0)]
        return DTensor.from_local(part, self._mesh, placements, run_check=False, shape=shape, stride=strides)


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard a network unit by unit. Its class is another one then; files and libraries know it by its name."""
    kind, keeps_less = type(network), reshards(os.environ)
    for module in network.modules():
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, reshard_after_forward=keeps_less)
    fully_shard(network, mesh=mesh, reshard_after_forward=keeps_less)
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(type(network), name, getattr(kind, name))


def _shard_of(weight: Parameter) -> Parameter:
    shard = Parameter(local_part(weight).detach(), requires_grad=weight.requires_grad)
    assert shard.is_contiguous()
    return shard


def _parameters(networks: Iterable[nn.Module]) -> list[Parameter]:
    return [parameter for network in networks for parameter in network.parameters()]


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process keeps, which is all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def gathered(tensor: Tensor) -> Tensor | None:
    """Return a whole tensor in host memory, in the main process; of a sharded one all processes ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole.to("cpu", copy=True) if dist.get_rank() == 0 else None


def gathered_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of all processes, whole and in host memory, in the main process; all that are there already."""
    whole = {name: gathered(tensor) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def gathered_weights(networks: Iterable[nn.Module], replacing: Replacing | None = None) -> Replacing:
    """Return what the main process writes in place of the weights of sharded networks: all of each, in host memory.

    `replacing` has others in their place, such as an average. Every process calls it; one weight at a time is whole on
    the devices.
    """
    whole: dict[tuple[int, str], Tensor | None] = {}
    for network in networks:
        for name, held in network.state_dict().items():
            other = None if replacing is None else replacing(network, name)
            if isinstance(held, DTensor) or other is not None:
                whole[id(network), name] = gathered(held if other is None else other)
    return lambda network, name: whole.get((id(network), name))


@contextmanager
def without_accelerates_sharding() -> Iterator[None]:
    """Within the block accelerate makes plain processes: their weights are sharded here, in `Shards`.

    On CPUs it would leave the setting out without a word, and it would copy bfloat16 weights to float32.
    """
    asked = {name: os.environ.pop(name) for name in _ASKED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


_ASKED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
