"""Whether the disk holds what a run is going to save, before it starts."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library.config.atomic_files import require_disk_space
from library.optim.optimizers import OptimizerOptions, make_optimizer
from library.optim.rounding import KAHAN, NEAREST
from library.optim.stepping import state_beside_matrix
from library.training.checkpoints import Save, SaveOptions
from library.training.state import STATE_SUFFIX

_PROBE_SIDE = 256  # wide enough for the sums that Adafactor keeps of rows and columns to be small beside the matrix


def bytes_of(networks: Iterable[nn.Module], dtype: torch.dtype | None) -> int:
    """Bytes of the networks' weights in `dtype` (None: as they are held)."""
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def bytes_of_state(options: OptimizerOptions, networks: Iterable[nn.Module], rounding: str = NEAREST) -> int:
    """Bytes of a state: the weights of the trained networks, and what is kept beside each of them.

    What the optimizer keeps is measured beside a small matrix. A `rounding` with compensation keeps one more bfloat16
    for each weight that is one.
    """
    total = 0.0
    for network in networks:
        total += bytes_of([network], None)
        trained = [weights for weights in network.parameters() if weights.requires_grad]
        if not trained:
            continue
        weights = trained[0]
        make = partial(make_optimizer, options=options)
        kept = state_beside_matrix(make, _PROBE_SIDE, weights.dtype, weights.device).values()
        each = sum(value.numel() * value.dtype.itemsize for value in kept) / _PROBE_SIDE**2
        each += weights.dtype.itemsize if rounding == KAHAN and weights.dtype == torch.bfloat16 else 0
        total += each * sum(weights.numel() for weights in trained)
    return int(total)


def require_room(
    options: SaveOptions, *, model_bytes: int, state_bytes: int, steps: range, steps_per_epoch: int
) -> None:
    """Raise `UserError` unless the disk holds what a run of `steps` (from 1, those to come) saves and keeps."""
    assert options.output_dir is not None  # checked by problems()
    present = {path.name for path in options.output_dir.glob("*")}
    needed = _most_bytes(_saves(options, steps, steps_per_epoch), present, model_bytes, state_bytes)
    require_disk_space(options.output_dir, needed, "what this run is going to save")


def _saves(options: SaveOptions, steps: range, steps_per_epoch: int) -> Iterator[Save]:
    for step in steps:
        saves = [options.save_after_step(step)]
        if step % steps_per_epoch == 0 and step != steps[-1]:
            saves.append(options.save_after_epoch(step // steps_per_epoch))
        yield from (save for save in saves if save is not None)
    yield options.save_at_end()


def _most_bytes(saves: Iterable[Save], present: set[str], model_bytes: int, state_bytes: int) -> int:
    """The most that is on the disk at any moment beyond what is there now, in files called as those `present`."""
    models = {Path(name).stem for name in present if not name.endswith(STATE_SUFFIX)}
    states = {name.removesuffix(STATE_SUFFIX) for name in present if name.endswith(STATE_SUFFIX)}
    most = held = 0
    for save in saves:
        cost = model_bytes + (state_bytes if save.with_state else 0)
        most = max(most, held + cost)  # the new one lies beside the old one until it is complete
        held += model_bytes * (save.name not in models) + state_bytes * (save.with_state and save.name not in states)
        models.add(save.name)
        states |= {save.name} if save.with_state else set()
        held -= model_bytes * (save.outdated in models) + state_bytes * (save.outdated_state in states)
        models.discard(str(save.outdated))
        states.discard(str(save.outdated_state))
    return most
