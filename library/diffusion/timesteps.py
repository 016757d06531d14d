"""Which timesteps a step trains: draws from a distribution, one for each image or spread evenly over a step."""

from collections.abc import Callable
from functools import partial

import torch

from library.diffusion.noise import Generators
from library.diffusion.options import NUM_TIMESTEPS, TimestepOptions
from library.sdxl.device_copies import to_device

_LARGEST_SEED = 2**63 - 1


def draw_timesteps(
    batch_size: int,
    options: TimestepOptions,
    generators: Generators,
    device: torch.device | str,
    *,
    continuous: bool = False,
    strata: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Return timesteps [B] on `device` within the trained range: int64, or with `continuous` any float32 between.

    Where they are stratified, each image of the step has a part of the distribution to itself; which one is drawn for
    each step. `strata` says which number the first image of the batch has in its step (from 0), how many there are in
    all processes, and the seed of the step; without it the batch is the step.
    """
    trained = options.timestep_range
    normal = options.logit_normal
    if normal is None and not continuous and not options.stratified_timesteps:
        drawn = _drawn(partial(torch.randint, trained.start, trained.stop), batch_size, generators)
        return to_device(drawn, device)
    quantiles = _drawn(partial(torch.rand, dtype=torch.float64), batch_size, generators)
    if options.stratified_timesteps:
        quantiles = _stratified(quantiles, strata or _of_batch(batch_size, generators[0]))
    below, up_to = options.mass_below
    quantiles = below + (up_to - below) * quantiles
    if normal is not None:
        quantiles = torch.sigmoid(normal.mean + normal.stdev * torch.special.ndtri(quantiles))
    timesteps = quantiles * NUM_TIMESTEPS
    if continuous:
        below_end = torch.nextafter(torch.tensor(float(trained.stop)), torch.tensor(0.0)).item()
        return to_device(timesteps.float().clamp(trained.start, below_end), device)
    return to_device(timesteps.long().clamp(trained.start, trained.stop - 1), device)


def _drawn(draw: Callable[..., torch.Tensor], batch_size: int, generators: Generators) -> torch.Tensor:
    """Return what `draw(shape, generator, device)` draws from generators that share the batch equally."""
    shape = (batch_size // len(generators),)
    return torch.cat([draw(shape, generator=each, device=each.device) for each in generators])


def _stratified(uniform: torch.Tensor, strata: tuple[int, int, int]) -> torch.Tensor:
    """Return uniform numbers [B] of which each lies in another of `total` equal parts of 0-1."""
    first, total, seed = strata
    parts = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[first : first + len(uniform)]
    return (to_device(parts, uniform.device) + uniform) / total


def _of_batch(batch_size: int, generator: torch.Generator) -> tuple[int, int, int]:
    seed = torch.randint(_LARGEST_SEED, (), generator=generator, device=generator.device)
    return 0, batch_size, int(seed)
