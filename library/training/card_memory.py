"""Whether a GPU's memory holds what a step needs, before a model is loaded; by arithmetic, which a rehearsal proves."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from library.captions.draws import Encoder
from library.config.errors import UserError
from library.data.caption_report import encoders_to_cache
from library.data.image_columns import FoundImages
from library.data.subsets import Subset
from library.optim.optimizer_probe import require_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, KAHAN, NEAREST, STOCHASTIC
from library.sdxl.architecture import Architecture, empty_model
from library.training.disk_space import bytes_of_optimizer
from library.training.optimization import parameter_groups
from library.training.process_options import num_parts
from library.training.run_options import TrainingOptions

log = logging.getLogger(__name__)

GIB = 2**30
_ACTIVATIONS = {True: 0.68, False: 6.4}
"""GiB of each image of 1024x1024 in 16 bits, with gradient checkpointing and without it (rehearsed: 0.68 and 6.44)."""
_PIXELS = 1024 * 1024
_USUAL_WIDTH = 320


class Batch(NamedTuple):
    """The largest batch of a run: how many images, each of how many pixels."""

    num_images: int
    num_pixels: int


@dataclass(frozen=True)
class Change:
    """Flags that lower the memory of a step, and the options with them; None where they cannot be used."""

    flags: str
    apply: Callable[[TrainingOptions], TrainingOptions | None]


class CardMemory:
    """The memory of a step on a GPU: what cannot be less, by arithmetic, in bytes."""

    def __init__(self, architecture: Architecture, subsets: Sequence[Subset]):
        self._model = empty_model(architecture)
        self._width = architecture.unet["block_out_channels"][0] / _USUAL_WIDTH
        self._subsets = subsets
        self._each_alone: dict[tuple[str, tuple[str, ...]], bool] = {}
        self.num_parts = num_parts(os.environ)

    def parts(self, options: TrainingOptions, batch: Batch) -> dict[str, int]:
        """Return the bytes of weights, of gradients or activations (whichever are more) and of the optimizer."""
        trained = self._trained(options)
        narrow = torch.bfloat16 if options.precision.full_bf16 else torch.float32
        num_trained = sum(parameter.numel() for parameter in trained)
        gradients = 0 if options.optimizer.fused_backward_pass else num_trained * narrow.itemsize
        averages = options.ema.profiles if options.ema.ema_device == "gpu" else ()
        optimizer = self._optimizer(options, trained, narrow)
        widened = self._widened(options, num_trained, optimizer)
        activations = self._activations(options, batch)
        return {
            "weights": self._weights(options),
            "gradients and activations": 0 if widened else max(gradients // self.num_parts, activations),
            "optimizer": optimizer // self.num_parts,
            "copies in float32": widened // self.num_parts,
            "moving averages": len(averages) * num_trained * options.ema.dtype.itemsize // self.num_parts,
        }

    def _widened(self, options: TrainingOptions, num_trained: int, optimizer: int) -> int:
        """Return the bytes of the float32 copies that stochastic and compensated rounding take in the step.

        An optimizer that steps weights apart has those of a few. One that needs all at once has weights, gradients and
        state twice as wide, for which the activations and the narrow gradients have gone.
        """
        chosen = options.optimizer
        if options.precision.rounding == NEAREST or chosen.fused_backward_pass or chosen.offload_optimizer:
            return 0
        key = chosen.optimizer_type, tuple(chosen.optimizer_args or ())
        if key not in self._each_alone:
            make = partial(make_optimizer, options=chosen)
            self._each_alone[key] = require_each_alone(make, chosen, torch.device("cpu"))
        return 0 if self._each_alone[key] else 2 * num_trained * torch.float32.itemsize + optimizer

    def total(self, options: TrainingOptions, batch: Batch) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts(options, batch).values())

    def cached_encoders(self, options: TrainingOptions) -> list[Encoder] | None:
        """Return the encoders whose outputs are cached, None where the options demand what is impossible."""
        try:
            return encoders_to_cache(options.training_set, self._subsets, options.trained_encoders)[0]
        except UserError:
            return None

    def _trained(self, options: TrainingOptions) -> list[nn.Parameter]:
        for network in self._model.networks:
            network.requires_grad_(False)
        groups = parameter_groups(self._model, options.optimizer, trains_l=options.trains_l, trains_g=options.trains_g)
        return [parameter for group in groups for parameter in group["params"]]

    def _weights(self, options: TrainingOptions) -> int:
        dtypes = options.model_dtypes
        held = [(self._model.unet, dtypes.unet)]
        divided = {self._model.unet: True, self._model.text_encoder_l: options.trains_l}
        divided[self._model.text_encoder_g] = options.trains_g
        cached = self.cached_encoders(options) or []
        if "l" not in cached:
            held.append((self._model.text_encoder_l, dtypes.text_encoder_l))
        if "g" not in cached:
            held.append((self._model.text_encoder_g, dtypes.text_encoder_g))
        return sum(
            _num_numbers(network) * (dtype or torch.float32).itemsize // (self.num_parts if divided[network] else 1)
            for network, dtype in held
        )

    def _activations(self, options: TrainingOptions, batch: Batch) -> int:
        a_number = 2 if options.precision.mixed_precision == "no" else 1
        each = _ACTIVATIONS[options.run.gradient_checkpointing] * batch.num_pixels / _PIXELS * self._width
        return int(GIB * each * batch.num_images * a_number)

    def _optimizer(self, options: TrainingOptions, trained: Sequence[nn.Parameter], dtype: torch.dtype) -> int:
        if options.optimizer.offload_optimizer:
            return 0
        make = partial(make_optimizer, options=options.optimizer)
        probes = [nn.Parameter(parameter.detach().to(dtype)) for parameter in trained]
        return bytes_of_optimizer(make, probes, options.precision.rounding, torch.device("cpu"))


def require_card_memory(
    options: TrainingOptions,
    architecture: Callable[[], Architecture],
    found: FoundImages,
    subsets: Sequence[Subset],
    device: torch.device,
) -> CardMemory | None:
    """Raise `UserError` if a step cannot fit into the memory of the GPU, naming flags with which it fits.

    Warn if it does not fit into what other programs leave. Of other devices nothing is asked.
    """
    if device.type != "cuda":
        return None
    memory, batch = CardMemory(architecture(), subsets), largest_batch(options, found)
    needed = memory.parts(options, batch)
    total, free = torch.cuda.get_device_properties(device).total_memory, torch.cuda.mem_get_info(device)[0]
    said = f"a step takes at least {_said(sum(needed.values()))} ({_parts_said(needed)})"
    if sum(needed.values()) > total:
        raise UserError(f"{said}, and the GPU has {_said(total)}.", _remedy(memory, options, batch, total))
    if sum(needed.values()) > free:
        log.warning(
            "%s, and other programs leave %s of the GPU's %s: close them, or expect the GPU to run out of memory",
            *(said, _said(free), _said(total)),
        )
    return memory


def largest_batch(options: TrainingOptions, found: FoundImages) -> Batch:
    """Return the largest batch that the images can form; those without a known bucket count as of the resolution."""
    usual = options.resolution
    kinds = np.unique(np.column_stack([found.subset_of, found.buckets]), axis=0).tolist()  # of a million images, few
    sizes = [
        Batch(found.subsets[subset].batch_size, width * height or usual.width * usual.height)
        for subset, width, height in kinds
    ]
    return max(sizes, key=lambda batch: batch.num_images * batch.num_pixels)


def _remedy(memory: CardMemory, options: TrainingOptions, batch: Batch, total: int) -> str:
    """Return which flags make it fit: as few as suffice, and only then a smaller batch."""
    changes, least = _changes_that_fit(memory, options, batch, total)
    flags = [change.flags for change in changes]
    fewer = [batch._replace(num_images=number) for number in range(batch.num_images, 0, -1)]
    fitting = next((each for each in fewer if memory.total(least, each) <= total), None)
    if fitting is None:
        needed = _said(memory.total(least, fewer[-1]))
        with_all = (
            f"Even with {' '.join(flags)} and one image in a batch it takes {needed}" if flags else "It is the least"
        )
        return f"{with_all}: use smaller images, or a GPU with more memory."
    if fitting != batch:
        flags.append(f"--train_batch_size={fitting.num_images}")
    return f"Pass {' '.join(flags)}: it then takes {_said(memory.total(least, fitting))}."


def _changes_that_fit(
    memory: CardMemory, options: TrainingOptions, batch: Batch, total: int
) -> tuple[list[Change], TrainingOptions]:
    """Return the changes with which a step fits, or all that are possible, and the options with them."""
    changes: list[Change] = []
    changed = options
    for change in _changes(memory):
        if memory.total(changed, batch) <= total:
            break
        after = change.apply(changed)
        if after is not None:
            changes.append(change)
            changed = after
    if memory.total(changed, batch) > total:
        return changes, changed
    for change in changes[:-1]:  # what the last one has made unnecessary
        fewer = [each for each in changes if each is not change]
        with_fewer = _with_all(options, fewer)
        if with_fewer is not None and memory.total(with_fewer, batch) <= total:
            changes, changed = fewer, with_fewer
    return changes, changed


def _with_all(options: TrainingOptions, changes: Sequence[Change]) -> TrainingOptions | None:
    """Return the options with all changes, None if one of them is impossible without the others."""
    changed: TrainingOptions | None = options
    for change in changes:
        changed = None if changed is None else change.apply(changed)
    return changed


def _changes(memory: CardMemory) -> Iterator[Change]:
    """Yield the changes in the order of what they cost: nothing, time, precision, another optimizer."""

    def cached(options: TrainingOptions) -> TrainingOptions | None:
        if options.training_set.caches_texts:
            return None
        caching = replace(options, training_set=replace(options.training_set, cache_text_encoder_outputs=True))
        return caching if memory.cached_encoders(caching) else None

    def checkpointed(options: TrainingOptions) -> TrainingOptions | None:
        if options.run.gradient_checkpointing:
            return None
        return replace(options, run=replace(options.run, gradient_checkpointing=True))

    def rounded_at_random(options: TrainingOptions) -> TrainingOptions | None:
        if options.precision.rounding != KAHAN:
            return None
        return replace(options, precision=replace(options.precision, bf16_rounding=STOCHASTIC))

    def narrow(options: TrainingOptions) -> TrainingOptions | None:
        if options.precision.full_bf16:
            return None
        return replace(options, precision=replace(options.precision, full_bf16=True, mixed_precision="bf16"))

    def with_adafactor(options: TrainingOptions) -> TrainingOptions | None:
        arguments = [*ADAFACTOR_RECIPE.split()[1:], "flatten_convolutions=True"]
        return _with_optimizer(options, optimizer_type="Adafactor", optimizer_args=arguments)

    yield Change("--cache_text_encoder_outputs", cached)
    if memory.num_parts == 1:
        yield Change("--fused_backward_pass", partial(_with_optimizer, fused_backward_pass=True))
    yield Change("--gradient_checkpointing", checkpointed)
    yield Change("--bf16_rounding=stochastic", rounded_at_random)
    yield Change("--full_bf16 --mixed_precision=bf16", narrow)
    yield Change("--offload_optimizer", partial(_with_optimizer, offload_optimizer=True))
    if memory.num_parts == 1:
        yield Change(f"--optimizer_type=Adafactor {ADAFACTOR_RECIPE} flatten_convolutions=True", with_adafactor)


def _with_optimizer(options: TrainingOptions, **flags: Any) -> TrainingOptions | None:
    """Return the options with these flags of the optimizer; None if they are set already or cannot work."""
    optimizer = replace(options.optimizer, **flags)
    changed = replace(options, optimizer=optimizer)
    if optimizer == options.optimizer or list(optimizer.problems()) or list(changed.conflicts()):
        return None
    try:
        require_each_alone(partial(make_optimizer, options=optimizer), optimizer, torch.device("cpu"))
    except UserError:
        return None
    return changed


def _num_numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _said(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _parts_said(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num_bytes / GIB:.1f}" for name, num_bytes in parts.items() if num_bytes)
