"""Whether the disk holds what a run is going to save, before it starts."""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn

from library.config.atomic_files import require_disk_space
from library.optim.optimizer_probe import MakeOptimizer, bytes_of_state_a_weight
from library.optim.optimizers import make_optimizer
from library.optim.options import KAHAN, NEAREST, OptimizerOptions
from library.training.progress import STATE_SUFFIX
from library.training.saves import SaveOptions, is_counted, recent_name


def bytes_of(networks: Iterable[nn.Module], dtype: torch.dtype | None) -> int:
    """Return the bytes of the networks' weights in `dtype` (None: as they are held)."""
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors)


def bytes_of_state(options: OptimizerOptions, networks: Iterable[nn.Module], rounding: str = NEAREST) -> int:
    """Return the bytes of a state: the weights of the trained networks and what the optimizer keeps for them.

    The latter is measured on small weights. Compensated `rounding` keeps one more bfloat16 for each bfloat16 weight.
    """
    make = partial(make_optimizer, options=options)
    return sum(
        bytes_of([network], None) + bytes_of_optimizer(make, list(network.parameters()), rounding)
        for network in networks
    )


def bytes_of_optimizer(
    make: MakeOptimizer, parameters: Iterable[nn.Parameter], rounding: str, device: torch.device | None = None
) -> int:
    """Return the bytes of what the optimizer keeps for the parameters that are trained.

    It is tried on a few numbers: on `device`, None for that of the parameters.
    """
    counts: Counter[tuple[int, torch.dtype, torch.device]] = Counter()
    for weights in parameters:
        if weights.requires_grad:
            counts[weights.ndim, weights.dtype, device or weights.device] += weights.numel()
    total = 0.0
    for (num_dimensions, dtype, place), count in counts.items():
        each = bytes_of_state_a_weight(make, num_dimensions, dtype, place)
        each += dtype.itemsize if rounding == KAHAN and dtype == torch.bfloat16 else 0
        total += each * count
    return int(total)


def require_disk_for_saves(
    options: SaveOptions,
    *,
    model_bytes: int,
    state_bytes: int,
    steps: range,
    steps_per_epoch: int,
    snapshot_bytes: int = 0,
    snapshot_every: int | None = None,
) -> None:
    """Raise `UserError` unless the disk holds what a run of `steps` (from 1, those to come) saves and keeps.

    That is one more model and one more state than are kept: a new one lies beside the old ones until it is complete.
    What earlier runs of the same name have left counts as kept already. What a `save` file will ask for is not known.
    `model_bytes` are those of a save, the moving average with them; `snapshot_bytes` are kept after every
    `snapshot_every` steps and the last one.
    """
    assert options.output_dir is not None  # checked by problems()
    models, states = num_saves(options, steps, steps_per_epoch)
    snapshots = 0 if snapshot_every is None else _num_multiples(snapshot_every, steps[:-1]) + 1
    needed = models * model_bytes + states * state_bytes + snapshots * snapshot_bytes
    require_disk_space(options.output_dir, needed, "to save what this run keeps")


def num_saves(options: SaveOptions, steps: range, steps_per_epoch: int) -> tuple[int, int]:
    """Return how many models and states more a run of `steps` (from 1) has on the disk at once than there are now."""
    assert options.output_dir is not None  # checked by problems()
    models = 1 + sum(_kept(options, steps, steps_per_epoch, states=False))
    at_least_one_state = int(options.has_states)
    states = at_least_one_state
    if options.save_state:
        states += sum(_kept(options, steps, steps_per_epoch, states=True))
    if options.save_last_n_steps is not None or options.save_last_n_epochs is not None:
        models = max(1, models - _num_present(options, is_state=False))
        states = max(at_least_one_state, states - _num_present(options, is_state=True))
    if options.save_every_n_minutes is not None:
        present = {path.stem for path in options.output_dir.glob(f"{glob.escape(recent_name(options.output_name))}*")}
        models += recent_name(options.output_name) not in present
        states += f"{recent_name(options.output_name)}{STATE_SUFFIX}" not in present
    return models, states


def _kept(options: SaveOptions, steps: range, steps_per_epoch: int, *, states: bool) -> Iterator[int]:
    """Yield how many of the saves by step, and of those by epoch, are on the disk at once."""
    if options.save_every_n_steps is not None:
        every, keep = options.save_every_n_steps, options.save_last_n_steps
        keep = options.save_last_n_steps_state or keep if states else keep
        num_saves = _num_multiples(every, steps)
        yield num_saves if keep is None else min(num_saves, keep // every + 1)
    if options.save_every_n_epochs is not None:
        every, keep = options.save_every_n_epochs * steps_per_epoch, options.save_last_n_epochs
        keep = options.save_last_n_epochs_state or keep if states else keep
        num_saves = _num_multiples(every, steps[:-1])  # after the last step the final model is saved instead
        yield num_saves if keep is None else min(num_saves, keep)


def _num_multiples(every: int, steps: range) -> int:
    return (steps.stop - 1) // every - (steps.start - 1) // every


def _num_present(options: SaveOptions, *, is_state: bool) -> int:
    """Count the saves in the output folder that this run replaces or removes."""
    assert options.output_dir is not None  # checked by problems()
    names = {path.name for path in options.output_dir.glob("*") if is_counted(options, path.name)}
    return sum(name.endswith(STATE_SUFFIX) == is_state for name in names)
