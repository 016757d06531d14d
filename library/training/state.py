"""The saved state of a run: everything it needs to continue as if it had never stopped, written and read back."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.atomic_files import replacing_folder, write_text
from library.config.digests import DigestAbreast, WrittenDigest
from library.config.errors import UserError
from library.optim.lr_schedules import restore_schedule
from library.sdxl.tensor_file import (
    TensorToWrite,
    first_line,
    open_tensors,
    read_pickled,
    write_pickled,
    write_safetensors,
)
from library.training.distribution import agreed, from_main
from library.training.optimizer_state import empty_place, optimizer_state, place_of, read_optimizer, restore_optimizer
from library.training.progress import (
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    SHARD_PREFIX,
    WEIGHTS_FILE,
    DamagedState,
    Progress,
    StateRecord,
    read_record,
)
from library.training.resumable import Resumable
from library.training.sharding import Shards
from library.training.state_shards import StateShards, save_shards, split_off

log = logging.getLogger(__name__)


def write_state(folder: Path, progress: Progress, learnt: Resumable) -> None:
    """Write a state, completely or not at all; weights are streamed. Raise `CannotWrite` if that is impossible.

    Of sharded weights every process calls it and writes its part; all of them raise the same.
    """
    if learnt.shards is not None:
        _write_in_parts(folder, progress, learnt, learnt.shards)
        return
    with replacing_folder(folder, marker=PROGRESS_FILE) as unfinished:
        weights = WrittenDigest()
        write_safetensors(unfinished / WEIGHTS_FILE, _weights(learnt.networks), {"format": "pt"}, weights)
        sizes = {WEIGHTS_FILE: (unfinished / WEIGHTS_FILE).stat().st_size}
        contents: dict[str, Callable[[], Any]] = {OPTIMIZER_FILE: partial(optimizer_state, learnt)}
        contents |= {_file_of(name): other.state_dict for name, other in learnt.others.items()}
        _write_rest(unfinished, progress, contents, sizes, {WEIGHTS_FILE: weights.hex()})


def _write_rest(
    unfinished: Path,
    progress: Progress,
    contents: Mapping[str, Callable[[], Any]],
    sizes: dict[str, int],
    digests: dict[str, str],
) -> None:
    """Write what `contents` make, and the record of all files; `sizes` and `digests` are those of the others."""
    for name, make in contents.items():
        digest = WrittenDigest()
        write_pickled(unfinished / name, make(), digest)
        sizes[name], digests[name] = (unfinished / name).stat().st_size, digest.hex()
    write_text(unfinished / PROGRESS_FILE, StateRecord(progress, sizes, digests).as_text())


def _write_in_parts(folder: Path, progress: Progress, learnt: Resumable, shards: Shards) -> None:
    accelerator, tensors = shards.accelerator, {f"{WEIGHTS_FILE}/{name}": each for name, each in _held(learnt.networks)}
    contents = {OPTIMIZER_FILE: optimizer_state(learnt)}
    contents |= {_file_of(name): other.state_dict() for name, other in learnt.others.items()}
    makers = {name: partial(_itself, split_off(content, name, tensors)) for name, content in contents.items()}
    with agreed(accelerator), ExitStack() as stack:  # left first: an error of the last renaming is shared, too
        replacing = replacing_folder(folder, marker=PROGRESS_FILE)
        unfinished = from_main(accelerator, partial(stack.enter_context, replacing))
        sizes, digests = save_shards(unfinished, tensors, shards)
        with agreed(accelerator):
            if accelerator.is_main_process:
                _write_rest(unfinished, progress, makers, sizes, digests)


def read_learnt(folder: Path, learnt: Resumable) -> None:
    """Load the weights and the optimizer of a state into `learnt`, in place.

    Raise `DamagedState` if its files are not what was written (`learnt` is of no use then), `UserError` if they belong
    to another set of trained networks or to another optimizer.
    """
    digests = read_record(folder).digests
    of_shards = {name: each for name, each in digests.items() if name.startswith(SHARD_PREFIX)}
    parts = StateShards(folder, of_shards) if of_shards else None
    if parts is not None:
        changed = _read_parts_of_weights(folder, learnt, parts)
    else:
        with _checked(folder / WEIGHTS_FILE, digests) as follow:
            changed = _read_weights(folder, learnt, follow)
    with _checked(folder / OPTIMIZER_FILE, digests) as follow:
        content = read_optimizer(folder / OPTIMIZER_FILE)
        try:
            if parts is not None:
                content = parts.fill(content, OPTIMIZER_FILE, partial(place_of, learnt))
            restore_optimizer(learnt, content, folder, changed, follow)
            restore_schedule(learnt.lr_schedule, learnt.optimizer, content["lr_schedule"])
            if learnt.scaler is not None and content["scaler"] is not None:
                learnt.scaler.load_state_dict(content["scaler"])
        except _RESTORING_ERRORS as error:
            raise UserError(
                f"'{folder / OPTIMIZER_FILE}' does not hold the optimizer of this run ({first_line(error)}).",
                "Resume from another state.",
            ) from error
    digests = {name: each for name, each in digests.items() if name not in of_shards}
    _read_others(folder, learnt, digests, parts)


def _file_of(name: str) -> str:
    return f"{name}.pt"


def _read_others(folder: Path, learnt: Resumable, digests: Mapping[str, str], parts: StateShards | None) -> None:
    """Load what a state holds beside weights and optimizer, and say what it lacks and what is not continued."""
    files = {_file_of(name): other for name, other in learnt.others.items()}
    for name in digests.keys() - files.keys() - {WEIGHTS_FILE, OPTIMIZER_FILE}:
        log.warning("'%s' is not continued by this run, and its next states are without it", folder / name)
    for name, other in files.items():
        if name not in digests:
            log.warning("'%s' holds no %s: what it would hold begins at the step of the state", folder, name)
            continue
        with _checked(folder / name, digests):
            try:
                content = read_pickled(folder / name)
                if parts is not None:
                    content = parts.fill(content, name, partial(_host_memory, learnt))
                other.load_state_dict(content)
            except _RESTORING_ERRORS as error:
                raise UserError(
                    f"'{folder / name}' does not belong to this run ({first_line(error)}).",
                    "Resume from another state, or with the options of the run that saved it.",
                ) from error


_RESTORING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What an optimizer's state raises that this program did not write, or whose digest nobody noted."""


@contextmanager
def _checked(path: Path, digests: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
    """Compare the digest of a file that is read in the block, from its beginning to its end, with the recorded one.

    What is yielded is called with the number of bytes after each part was read. Raise `DamagedState` if they differ,
    whatever reading such a file has raised.
    """
    if path.name not in digests:  # a state of an earlier version
        yield lambda num_bytes: None
        return
    with DigestAbreast(path) as following:
        try:
            yield following.advance
        finally:  # the numbers of a damaged file may have raised anything
            if following.hex() != digests[path.name]:
                raise DamagedState(path.parent, f"{path.name} is not as it was written")


def _host_memory(learnt: Resumable, name: str, tensor: Tensor) -> Tensor:
    return empty_place(learnt, tensor, torch.device("cpu"))


def _read_weights(folder: Path, learnt: Resumable, follow: Callable[[int], None]) -> set[nn.Parameter]:
    """Load the weights into the networks; return the parameters that were saved in another precision."""
    changed, shards = set(), learnt.shards
    with open_tensors(folder / WEIGHTS_FILE) as reader, torch.no_grad():
        _require_fitting_weights(folder, learnt, reader.shapes)
        parameters = _parameters(learnt)
        for name, tensor in _held(learnt.networks):
            saved, held = reader.get(name), parameters.get(name)
            if shards is not None and held is not None:
                held.copy_(shards.part(saved))
            else:
                tensor.copy_(saved)
            follow(saved.nbytes)
            if held is not None and saved.dtype != tensor.dtype:
                changed.add(held)
    return changed


def _read_parts_of_weights(folder: Path, learnt: Resumable, parts: StateShards) -> set[nn.Parameter]:
    """Do what `_read_weights` does with a state that several processes have written."""
    start = f"{WEIGHTS_FILE}/"
    shapes = {name.removeprefix(start): shape for name, shape in parts.shapes.items() if name.startswith(start)}
    _require_fitting_weights(folder, learnt, shapes)
    parts.read({f"{start}{name}": tensor for name, tensor in _held(learnt.networks)})
    parameters = _parameters(learnt)
    return {each for name, each in parameters.items() if parts.dtypes[f"{start}{name}"] != each.dtype}


def _require_fitting_weights(folder: Path, learnt: Resumable, saved: Mapping[str, tuple[int, ...]]) -> None:
    if {name: tuple(tensor.shape) for name, tensor in _held(learnt.networks)} != saved:
        raise UserError(
            f"'{folder}' holds other weights than this run trains.",
            "Pass the same model and --train_text_encoder flags as when the state was made.",
        )


def _parameters(learnt: Resumable) -> dict[str, nn.Parameter]:
    """Return the parameters as the optimizer has them, by network and name."""
    held = {
        f"{name}.{key}": parameter
        for name, network in learnt.networks.items()
        for key, parameter in network.named_parameters()
    }
    return held if learnt.shards is None else {name: learnt.shards.of(each) for name, each in held.items()}


def _held(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of networks, by network and name."""
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            yield f"{name}.{key}", tensor


def _weights(networks: Mapping[str, nn.Module]) -> Iterator[TensorToWrite]:
    for name, tensor in _held(networks):
        yield TensorToWrite.of(name, tensor)


def _itself(content: Any) -> Any:
    return content
