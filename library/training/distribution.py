"""Several processes as one run: prepare, exchange gradients, agree, and let one of them write."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from library.config.digests import digest
from library.config.errors import UserError, listed

Item = TypeVar("Item")
_MOST_SHOWN = 3
_LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for one that saves, samples or encodes."""


def prepare(
    accelerator: Accelerator, networks: Mapping[str, nn.Module], optimizer: Optimizer, *, exchanges: bool = True
) -> tuple[dict[str, nn.Module], Optimizer]:
    """Return the trained networks and their optimizer as accelerate runs them.

    Without `exchanges` gradients stay in their process: somebody else averages them (`optim/chunk_exchange`).
    """
    if not exchanges:
        alone = {name: accelerator.prepare_model(each, evaluation_mode=True) for name, each in networks.items()}
        return alone, accelerator.prepare_optimizer(optimizer)
    *prepared, prepared_optimizer = accelerator.prepare(*networks.values(), optimizer)
    return dict(zip(networks, prepared, strict=True)), prepared_optimizer


@contextmanager
def one_writer(accelerator: Accelerator) -> Iterator[bool]:
    """Yield whether this process is the one that writes; every process enters the block, and all leave it together.

    What is written (a model, a state, an image) is decided alike in every process, since gathering sharded weights
    takes all of them. An error of the writer is raised after the others have arrived.
    """
    try:
        yield accelerator.is_main_process
    except Exception:
        wait_for_main(accelerator)
        raise
    wait_for_main(accelerator)


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Run the block in the main process, then in the others, each as long as it takes; all leave it together."""
    if not accelerator.is_main_process:
        wait_for_main(accelerator)
    yield
    if accelerator.is_main_process:
        wait_for_main(accelerator)
    _meet(accelerator, _LONGEST_WAIT)


def wait_for_main(accelerator: Accelerator) -> None:
    """Wait until all processes are here: a day for the main one, which works while the others wait.

    The main one waits for them only as long as in a step. Raise `RuntimeError` after that.
    """
    _meet(accelerator, accelerator.init_handler.timeout if accelerator.is_main_process else _LONGEST_WAIT)


def _meet(accelerator: Accelerator, patience: timedelta) -> None:
    """Wait for all processes, at most so long. Raise `RuntimeError` after that."""
    if accelerator.num_processes == 1:
        return
    if not torch.distributed.is_initialized():  # no processes of torch's: TPUs
        accelerator.wait_for_everyone()
        return
    torch.distributed.monitored_barrier(_group_of_hosts(torch.distributed.group.WORLD), patience, wait_all_ranks=True)


@lru_cache(maxsize=1)
def _group_of_hosts(world: object) -> Any:
    """Return the group of all processes in which their hosts, and not their GPUs, wait for each other."""
    return torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)


@contextmanager
def exchange_gradients(accelerator: Accelerator, networks: Iterable[nn.Module], *, now: bool) -> Iterator[None]:
    """Within the block, `backward` averages gradients over processes if `now`, else only accumulates them locally."""
    with ExitStack() as stack:
        if not now:
            for network in networks:
                stack.enter_context(accelerator.no_sync(network))
        yield


def mean_over_processes(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a number over all processes."""
    return accelerator.reduce(value, reduction="mean")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether `flag` is set in at least one process: the same answer in every process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))


def all_of(accelerator: Accelerator, names: list[str]) -> list[str]:
    """Return the names of all processes, each once. Every process has to call it."""
    return list(dict.fromkeys(gather_object(names)))


class SharedError(UserError):
    """A mistake that every process finds and raises; the main one says it."""

    is_shared = True


def require_alike(accelerator: Accelerator, what: str, mine: Mapping[str, str]) -> None:
    """Raise `SharedError` naming what differs unless `mine` is the same in all processes, each of which calls it."""
    if accelerator.num_processes == 1:
        return
    fingerprints = gathered([digest([json.dumps(dict(mine)).encode()], 8).hex()])
    if len(set(fingerprints)) == 1:
        return
    others = gathered([dict(mine)])  # only now: of a million images it is long
    other = next(place for place, each in enumerate(fingerprints) if each != fingerprints[0])
    theirs, first = others[other], others[0]
    names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
    shown = [f"{name} ({first.get(name, 'none')} and {theirs.get(name, 'none')})" for name in names[:_MOST_SHOWN]]
    raise SharedError(
        f"the processes were started with different {what}: process 0 and {other} differ in "
        f"{listed([*shown, *names[_MOST_SHOWN:]], _MOST_SHOWN) or 'their order'}.",
        "Start all of them with the same command, files and packages.",
    )


@contextmanager
def agreed(accelerator: Accelerator) -> Iterator[None]:
    """Raise in every process the `UserError` that one of them has raised in the block, which all enter and leave."""
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    wait_for_main(accelerator)  # it may have written for a long time
    told = gathered([None if own is None else (type(own), vars(own), own.args)])
    if own is not None:
        raise own
    first = next((each for each in told if each is not None), None)
    if first is not None:
        raise _made_again(*first)


def _made_again(kind: type[UserError], attributes: dict[str, Any], arguments: tuple[Any, ...]) -> UserError:
    error = kind.__new__(kind)
    vars(error).update(attributes)
    error.args = arguments
    return error


def from_main(accelerator: Accelerator, make: Callable[[], Item]) -> Item:
    """Return what `make` returns in the main process, in all of them. Raise in all the `UserError` that it raises."""
    with agreed(accelerator):
        made = [make() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(made, src=0)
    [found] = made
    return cast(Item, found)


def gathered(items: list[Item]) -> list[Item]:
    """Return the items of all processes, one process after another. Every process has to call it."""
    return list(gather_object(items))
