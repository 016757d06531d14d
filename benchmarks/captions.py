"""Measure what captions cost: the texts of a batch in the loader, and the start of a large set.

    python benchmarks/captions.py [--parts batch start] [--num_images 100000] [--num_rounds 3]

The batch: final texts, token ids and cached rows of four images of SDXL's widths. The start: everything from the
metadata to the first batch but the networks, of images that are links to a few files, with caption dropout and
shuffled tags and without. Processor seconds stand beside those of the clock: on a busy machine the clock measures the
others too. The results go to benchmarks/results/captions_batch_cpu.{json,txt} and captions_start_cpu.{json,txt}.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import torch
from PIL import Image

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.captions.draws import Encoder
from library.captions.final_captions import CaptionPair
from library.captions.options import CaptionOptions
from library.config.digests import file_digest
from library.data.caption_report import report_captions
from library.data.caption_tokens import cut_captions, tokenizer_for
from library.data.captioning import Captioning
from library.data.epoch_order import MicroBatch
from library.data.fingerprints import Fingerprints
from library.data.flag_subsets import subset_of_flags
from library.data.latent_cache import CachedLatents, write_cache
from library.data.latents_of_set import read_training_set
from library.data.loader_options import LoaderOptions
from library.data.subsets import Subset
from library.data.text_cache import CachedTexts, OutputsInMemory, texts_of
from library.data.training_images import TrainingImage
from library.data.training_set import find_training_images
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.images.crops import Crop
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size
from library.training.preparation import make_order
from library.training.run_options import RunOptions

BATCH_SIZE = 4
_SIDE = Size(64, 64)
_EPOCHS_OF_A_ROUND = 5
_LINKS_OF_A_FILE = 10_000  # file systems allow some ten thousand
_TAGS = "1girl, solo, long hair, blue eyes, school uniform, looking at viewer, smile, outdoors, cherry blossoms"
_SENTENCE = "A girl with long hair stands under cherry trees and smiles at the camera, number"
_VARYING = {
    "shuffle_caption_l": True,
    "keep_tokens_l": 1,
    "caption_tag_dropout_rate_l": 0.1,
    "caption_dropout_rate": 0.1,
    "caption_dropout_rate_l": 0.05,
}
_WIDTHS: dict[Encoder, tuple[int, ...]] = {"l": (768,), "g": (1280, 1280)}
BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "captions as they are": ({}, ""),
    "captions as they are, L and G cached": ({}, "lg"),
    "L shuffled, both dropped": (_VARYING, ""),
    "L shuffled, both dropped, G cached": (_VARYING, "g"),
    "L shuffled in ten variants, both dropped, L and G cached": ({**_VARYING, "caption_variants_l": 10}, "lg"),
    "L shuffled, both dropped, weighted": ({**_VARYING, "weighted_captions": True}, ""),
}
"""What is measured of a batch: the flags of captions, and the encoders whose outputs are cached."""


def options_of(folder: Path) -> TrainingSetOptions:
    """Return the flags of a set in `folder`."""
    return TrainingSetOptions(train_data_dir=folder / "images", in_json=folder / "meta.json", flip_aug=False)


def subset_with(folder: Path, flags: dict[str, Any]) -> Subset:
    """Return a subset whose captions are treated as flags say."""
    rule = BucketRule(_SIDE, _SIDE.width, _SIDE.width, _SIDE.width, no_upscale=False)
    return subset_of_flags(
        options_of(folder), LoaderOptions(train_batch_size=BATCH_SIZE), CaptionOptions(**flags), rule
    )


def caption_pair(number: int) -> tuple[str, str]:
    """Return captions of L and G that no other image has."""
    return f"{_TAGS}, tag {number}", f"{_SENTENCE} {number}."


# -- a batch ----------------------------------------------------------------------------------------------------------


def images_of(subset: Subset, count: int) -> list[TrainingImage]:
    """Return images that are captions alone."""
    pairs = [CaptionPair(*((text,) for text in caption_pair(number))) for number in range(count)]
    return [TrainingImage(str(number), pair, subset, _SIDE, _SIDE, Crop(0, 0, 0)) for number, pair in enumerate(pairs)]


def captioning_of(images: Sequence[TrainingImage], cached: str) -> Captioning:
    """Return what makes the texts of a batch; outputs of the encoders `cached` are there, in bfloat16."""
    tokens = tokenizer_for(image.subset for image in images)
    outputs: dict[str, OutputsInMemory] = {}
    for encoder, widths in _WIDTHS.items():
        if encoder in cached:
            rows = {key: row for row, key in enumerate(texts_of(images, tokens, encoder, 1))}
            shapes = [(len(rows), 77, widths[0]), *((len(rows), width) for width in widths[1:])]
            tensors = tuple(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
            outputs[encoder] = OutputsInMemory(rows, tensors)
    return Captioning(tokens, 1, 1000, CachedTexts(outputs.get("l"), outputs.get("g")))


def ms_of_a_batch(folder: Path, flags: dict[str, Any], cached: str, num_rounds: int) -> list[float]:
    """Return the milliseconds of a batch, by the clock and of the processor, each of the best of `num_rounds` epochs.

    Texts that vary are new in each epoch.
    """
    images = images_of(subset_with(folder, flags), 200)
    captioning = captioning_of(images, cached)
    best = [float("inf")] * 2
    for epoch in range(1, num_rounds + 2):
        batches = [
            MicroBatch(tuple(range(first, first + BATCH_SIZE)), (0,) * 4, (False,) * 4, epoch, 0, 0.25, True)
            for first in range(0, len(images), BATCH_SIZE)
        ]
        started = time.perf_counter(), time.process_time()
        for batch in batches:
            draws = [captioning.draw(images[index], batch, place) for place, index in enumerate(batch.indices)]
            captioning.of([images[index] for index in batch.indices], draws)
        ended = time.perf_counter(), time.process_time()
        best = [
            min(old, 1e3 * (end - start) / len(batches)) for old, start, end in zip(best, started, ended, strict=True)
        ]
    return best


# -- the start --------------------------------------------------------------------------------------------------------


def write_set(folder: Path, num_images: int) -> None:
    """Write metadata and, as links to a few files, images with their latents."""
    images = folder / "images"
    images.mkdir(parents=True)
    shape = (LATENT_CHANNELS, _SIDE.height // PIXELS_PER_LATENT, _SIDE.width // PIXELS_PER_LATENT)
    latents = np.random.default_rng(0).normal(scale=8, size=shape).astype(np.float32)
    metadata = {}
    for number in range(num_images):
        file, original = images / f"{number:06}.png", folder / f"{number // _LINKS_OF_A_FILE}.png"
        if number % _LINKS_OF_A_FILE == 0:
            Image.new("RGB", _SIDE).save(original)
            whole = (0.0, 0.0, float(_SIDE.width), float(_SIDE.height))
            cached = CachedLatents(
                latents, _SIDE, whole, resized_size=_SIDE, image_digest=file_digest(original), vae_digest="vae"
            )
            write_cache(original.with_suffix(".npz"), cached)
        for suffix in (".png", ".npz"):
            os.link(original.with_suffix(suffix), file.with_suffix(suffix))
        caption_l, caption_g = caption_pair(number)
        metadata[file.stem] = {"captionL": caption_l, "captionG": caption_g, "train_resolution": list(_SIDE)}
    (folder / "meta.json").write_text(json.dumps(metadata), encoding="utf-8")


def seconds_of_a_start(folder: Path, flags: dict[str, Any]) -> dict[str, list[float]]:
    """Return seconds, by the clock and of the processor, of each part of a start but the networks."""
    seconds: dict[str, list[float]] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        made = call()
        seconds[part] = [time.perf_counter() - clock, time.process_time() - processor]
        return made

    options, subset = options_of(folder), subset_with(folder, flags)
    found = timed("find images and captions", lambda: find_training_images([subset]))
    timed("report captions", lambda: report_captions(options, [subset], found, trains_unet=True, trained=()))
    images = timed("read latents", lambda: read_training_set(found, "vae"))
    tokens = timed("tokenize", lambda: tokenizer_for(image.subset for image in images))
    timed("fingerprints and cut captions", lambda: (Fingerprints(images), cut_captions(images, tokens)))
    order = timed("order", lambda: make_order(images, RunOptions(), 1, num_processes=1, process_index=0))
    order.start_at(0)
    captioning = Captioning(tokens, 1, 1000)

    def first_batch() -> None:
        batch = next(iter(order))
        draws = [captioning.draw(images[index], batch, place) for place, index in enumerate(batch.indices)]
        captioning.of([images[index] for index in batch.indices], draws)

    timed("first batch", first_batch)
    return seconds


def total(seconds: dict[str, list[float]]) -> list[float]:
    """Return seconds of all parts, by the clock and of the processor."""
    return [sum(each[index] for each in seconds.values()) for index in (0, 1)]


def measure_batches(num_rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each kind of batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {label: ms_of_a_batch(folder, *each, _EPOCHS_OF_A_ROUND * num_rounds) for label, each in BATCHES.items()}


def measure_starts(num_images: int, num_rounds: int) -> dict[str, Any]:
    """Return the seconds of a plain and of a varied start, of each the one that took the processor least."""
    starts: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, num_images)
        for _ in range(num_rounds):
            for label, flags in {"plain": {}, "varied": _VARYING}.items():
                seconds = seconds_of_a_start(folder, flags)
                if label not in starts or total(seconds)[1] < total(starts[label])[1]:
                    starts[label] = seconds
    return starts


def batch_lines(batches: dict[str, Any], num_images: int) -> Iterator[str]:
    """Yield the lines of a table of batches."""
    yield f"final texts, tokens and cached rows of {BATCH_SIZE} images, one thread, by the clock (of the processor):"
    for label, (clock, processor) in batches.items():
        yield f"    {label:58} {clock:6.3f} ms ({processor:5.3f})"


def start_lines(starts: dict[str, Any], num_images: int) -> Iterator[str]:
    """Yield the lines of a table of starts."""
    yield f"start of {num_images} images but for the networks, seconds by the clock (of the processor):"
    starts = {label: {**parts, "all": total(parts)} for label, parts in starts.items()}
    for part in starts["plain"]:
        cells = [
            f"{label} {clock:7.2f} ({processor:6.2f})" for label in starts for clock, processor in [starts[label][part]]
        ]
        yield f"    {part:32} {'   '.join(cells)}"
    clock, processor = (
        varied / plain for varied, plain in zip(starts["varied"]["all"], starts["plain"]["all"], strict=True)
    )
    yield f"    varied / plain: {clock:.3f} by the clock, {processor:.3f} of the processor"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("batch", "start"), default=("batch", "start"))
    parser.add_argument("--num_images", type=int, default=100_000)
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    measures = {
        "batch": (lambda: measure_batches(arguments.num_rounds), batch_lines),
        "start": (lambda: measure_starts(arguments.num_images, arguments.num_rounds), start_lines),
    }
    for part in arguments.parts:
        measure, lines = measures[part]
        load = [os.getloadavg()[0]]
        figures = measure()
        load.append(os.getloadavg()[0])
        about = {"machine": ceilings.machine(), "load": load, "num_images": arguments.num_images}
        table = [
            machine_line(about["machine"]),
            f"load {load[0]:.1f} before, {load[1]:.1f} after",
            "",
            *lines(figures, arguments.num_images),
        ]
        print("\n".join(table))
        write_result(arguments.results / f"captions_{part}_cpu", {**about, part: figures}, "\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
