"""The parts of a state that several processes keep: each writes its own, and any number of processes read them."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from library.config.digests import WrittenDigest, file_digest
from library.config.errors import UserError
from library.sdxl.tensor_file import TensorToWrite, first_line, write_safetensors
from library.training.distribution import agreed, gathered
from library.training.progress import SHARD_PREFIX, DamagedState
from library.training.sharding import Shards

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where in the header of a file torch's reader looks for the place of a part in the whole tensor."""


def split_off(content: Any, name: str, found: dict[str, Tensor]) -> Any:
    """Return `content` with tensors of no numbers in place of those of all processes, which are added to `found`.

    Their names are paths in dictionaries and lists: "optimizer.pt/state/3/exp_avg".
    """

    def without_numbers(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        found[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _with_tensors(content, name, without_numbers)


def _with_tensors(content: Any, name: str, make: Callable[[str, Tensor], Tensor]) -> Any:
    """Return `content` with what `make(name, tensor)` returns in place of each of its tensors."""
    if isinstance(content, Tensor):
        return make(name, content)
    if isinstance(content, Mapping):
        return {key: _with_tensors(value, f"{name}/{key}", make) for key, value in content.items()}
    if isinstance(content, list | tuple):
        made = [_with_tensors(value, f"{name}/{place}", make) for place, value in enumerate(content)]
        return tuple(made) if isinstance(content, tuple) else made
    return content


def save_shards(folder: Path, tensors: Mapping[str, Tensor], shards: Shards) -> tuple[dict[str, int], dict[str, str]]:
    """Write the parts of tensors, those of each process into a file; return sizes and digests by name of file.

    Every process calls it. Raise in all of them: `UserError` if one cannot write, `RuntimeError` for any other failure.
    """
    writer, failure = _ShardWriter(folder), None
    with agreed(shards.accelerator):
        try:
            distributed_checkpoint.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            if writer.refusal is not None:
                raise writer.refusal from None
            failure = error  # unless another process tells why it refused
    if failure is not None:
        raise RuntimeError(str(failure)) from failure  # torch's is no `Exception`, so that nothing would handle it
    written = dict(gathered([each for each in [writer.written] if each is not None]))
    return {name: (folder / name).stat().st_size for name in written}, written


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes the part of a process tensor by tensor; torch's writer would hold all of it twice in host memory."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder
        self.written: tuple[str, str] | None = None
        self.refusal: UserError | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of a plan into the file of this process."""
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        if plan.items:
            name = f"{SHARD_PREFIX}{plan.storage_data['shard_index']:05d}.safetensors"
            tensors, places = zip(*(_tensor_of(item, planner) for item in plan.items), strict=True)
            header = {"format": "pt", _PLACES: json.dumps(dict(places))}
            digest = WrittenDigest()
            try:
                write_safetensors(self._folder / name, tensors, header, digest)
            except UserError as error:  # which would not survive its way to the other processes
                self.refusal = error
                raise RuntimeError(error.problem) from error
            self.written = name, digest.hex()
        return done


def _tensor_of(item: WriteItem, planner: SavePlanner) -> tuple[TensorToWrite, tuple[str, Any]]:
    assert item.tensor_data is not None
    name, chunk, dtype = item.index.fqn, item.tensor_data.chunk, item.tensor_data.properties.dtype
    make: Callable[[], Any] = partial(planner.resolve_data, item)
    return TensorToWrite(name, tuple(chunk.sizes), dtype, make), (name, {_OFFSETS: list(chunk.offsets)})


class StateShards:
    """The tensors of a state that lie in files of several processes.

    Every process makes it. Raise `DamagedState` in all of them for files that are not as they were written; each
    process looks at its share of them.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]):
        share = sorted(digests)[_rank() :: _num_processes()]
        damaged = gathered([name for name in share if file_digest(folder / name) != digests[name]])
        if damaged:  # told to all, so that none reads it
            raise DamagedState(folder, f"{damaged[0]} is not as it was written")
        self._reader = _ShardReader(str(folder))
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except (SafetensorError, OSError, ValueError, LookupError) as error:
            raise DamagedState(folder, first_line(error)) from error
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}  # type: ignore[union-attr]
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}  # type: ignore[union-attr]

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what is saved into tensors; of those of all processes each reads its part."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose: each process reads alone
            distributed_checkpoint.load(dict(tensors), storage_reader=self._reader, no_dist=True)

    def fill(self, content: Any, name: str, empty: Callable[[str, Tensor], Tensor]) -> Any:
        """Return `content`, as `split_off` has left it, with its tensors read into what `empty(name, tensor)` makes."""
        found: dict[str, Tensor] = {}

        def place(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            found[name] = empty(name, tensor)
            return found[name]

        filled = _with_tensors(content, name, place)
        self.read(found)
        return filled


class _ShardReader(HuggingFaceStorageReader):
    """Reads the files of shards; their headers once."""

    _metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Return which tensors there are, and where their parts lie."""
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
