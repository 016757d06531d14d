"""Measure what a batch of cached latents costs: from .npz files, from shards, and with worker processes.

    python benchmarks/batches.py [--sides 96 1024] [--num_images 512]

Sets of images of one size lie in a temporary folder, with different latents in each file. First, single images are read
in random order in one thread; then whole batches are made, with their captions, tokens and sizes; then a loader makes
batches of 8 for some epochs. Seconds of the processor are those of the process that makes the batches. The result goes
to benchmarks/results/batches.{json,txt}.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from PIL import Image

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.config.digests import file_digest
from library.data.dataset import CaptionedImages, make_loader
from library.data.epoch_order import MicroBatch
from library.data.latent_cache import CachedLatents, write_cache
from library.data.latent_shards import shards_path
from library.data.loader_options import LoaderOptions
from library.data.shard_writing import ROWS, Member, write_manifest, write_shard
from library.data.training_columns import TrainingSet
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size
from tests.training_images import captioned, micro_batch, read_set

VAE = "benchmark"
BATCH_SIZES = (1, 4, 8)
WORKERS = (0, 1, 2, 4)
KINDS = {"npz": None, "shards, float32": torch.float32, "shards, bf16": torch.bfloat16}
_LOADED_BATCH = 8
_EPOCHS_OF_A_LOADER = 4


def make_sets(folder: Path, side: int, num_images: int) -> dict[str, TrainingSet]:
    """Return the same set with its latents in each kind of file."""
    images = folder / "images"
    images.mkdir(parents=True)
    cells, members, metadata = side // PIXELS_PER_LATENT, [], {}
    random = np.random.default_rng(side)
    for number in range(num_images):
        key = f"{number:06}"
        path = images / f"{key}.png"
        Image.new("RGB", (side, side), (number % 256, number // 256, 0)).save(path)
        latents = random.normal(scale=8, size=(LATENT_CHANNELS, cells, cells)).astype(np.float32)
        size, whole = Size(side, side), (0.0, 0.0, float(side), float(side))
        cached = CachedLatents(latents, size, whole, resized_size=size, image_digest=file_digest(path), vae_digest=VAE)
        write_cache(path.with_suffix(".npz"), cached)
        members.append(Member(key, cached))
        metadata[key] = {
            "captionG": f"a woman in nature, trees behind her, number {number}",
            "captionL": f"photographic, soft light, {number}",
            "train_resolution": [side, side],
        }
    sets = {}
    for kind, dtype in KINDS.items():
        in_json = folder / f"{kind}.json"
        in_json.write_text(json.dumps(metadata), encoding="utf-8")
        if dtype is not None:
            _write_shards(shards_path(in_json), members, dtype)
        options = TrainingSetOptions(train_data_dir=images, in_json=in_json)
        sets[kind] = read_set(options, BucketRule(Size(side, side), side, side, 64, no_upscale=False), VAE)
        assert sets[kind].all_have_latents
    return sets


def _write_shards(folder: Path, members: Sequence[Member], dtype: torch.dtype) -> None:
    folder.mkdir()
    parts = [members[first : first + ROWS] for first in range(0, len(members), ROWS)]
    write_manifest(folder, [write_shard(folder, part, dtype).name for part in parts])


def milliseconds(act: Callable[[], Any], times: int) -> tuple[float, float]:
    """Return the median of the time of a call, and the mean of that of the processor."""
    walls, processor = [], time.process_time()
    for _ in range(times):
        started = time.perf_counter()
        act()
        walls.append(time.perf_counter() - started)
    return statistics.median(walls) * 1000, (time.process_time() - processor) / times * 1000


def measured(images: TrainingSet) -> dict[str, Any]:
    """Return the figures of one set."""
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    picked, dataset = [images[index] for index in order], captioned(images)
    turn = iter(picked * 4)
    found: dict[str, Any] = {"sample": milliseconds(lambda: next(turn).sample(flipped=False), len(picked) * 4)}
    for size in BATCH_SIZES:
        made = map(dataset.__getitem__, micro_batches(order, size))
        found[f"batch of {size}"] = milliseconds(partial(next, made), len(order) // size - 1)
    for workers in WORKERS:
        found[f"{workers} workers"] = images_per_second(dataset, order, workers)
    return found


def micro_batches(order: Sequence[int], size: int) -> Iterator[MicroBatch]:
    """Yield batches of so many images in an order."""
    return (micro_batch(order[first : first + size]) for first in range(0, len(order), size))


class _Order:
    """Batches in an order that is known before: what a loader takes for the order of an epoch."""

    def __init__(self, order: Sequence[int]):
        self._batches = list(micro_batches(order, _LOADED_BATCH))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)


def images_per_second(dataset: CaptionedImages, order: Sequence[int], workers: int) -> float:
    """Return how many images a loader delivers in a second, once its workers run."""
    options = LoaderOptions(max_data_loader_n_workers=workers, persistent_data_loader_workers=workers > 0)
    loader = make_loader(dataset, _Order(order), options)  # type: ignore[arg-type]
    for _ in loader:
        pass
    started = time.perf_counter()
    for _ in range(_EPOCHS_OF_A_LOADER):
        for _ in loader:
            pass
    return len(order) * _EPOCHS_OF_A_LOADER / (time.perf_counter() - started)


def run(sides: Sequence[int], num_images: int) -> dict[str, Any]:
    """Return the figures of every kind of file at each size."""
    sets: dict[str, dict[str, Any]] = {}
    for side in sides:
        with tempfile.TemporaryDirectory() as name:
            sets[str(side)] = {
                kind: measured(images) for kind, images in make_sets(Path(name), side, num_images).items()
            }
    return {"machine": ceilings.machine(), "num_images": num_images, "sets": sets}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        machine_line(result["machine"]),
        f"{result['num_images']} images; milliseconds: the median, and in brackets the mean of the processor's",
        "",
        f"{'side':>5}  {'latents in':16} {'one image':>14}"
        + "".join(f"{f'batch of {size}':>16}" for size in BATCH_SIZES)
        + "   images/s in batches of 8 with "
        + ", ".join(map(str, WORKERS))
        + " workers",
    ]
    for side, kinds in result["sets"].items():
        for kind, found in kinds.items():
            times = [found[name] for name in ("sample", *(f"batch of {size}" for size in BATCH_SIZES))]
            cells = [f"{wall:7.3f} ({cpu:.3f})" for wall, cpu in times]
            rates = " / ".join(f"{found[f'{workers} workers']:.0f}" for workers in WORKERS)
            lines.append(f"{side:>5}  {kind:16}" + "".join(f"{cell:>16}" for cell in cells) + f"   {rates}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 1024])
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = run(arguments.sides, arguments.num_images)
    write_result(arguments.results / "batches", result, table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
