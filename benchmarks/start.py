"""Measure sdxl_train.py from the start of its process to the end of its first step, phase by phase.

    python benchmarks/start.py [--model sd_xl_base_1.0.safetensors] [--side 128] [--num_variants 2]
    python benchmarks/start.py --num_images 1000 16000 100000 1000000 [--shards]

Without --model it trains the tiny SDXL. Images are drawn and prepared in a temporary folder; each variant of the flags
runs in a separate process (benchmarks/phases.py). The result goes to benchmarks/results/start_<model>.{json,txt}. Needs
Linux to measure memory.

With --num_images it starts on prepared sets of so many images, which are links to a few files, each twice: the second
start finds what the first one has written. The result goes to benchmarks/results/start_large_<model>.{json,txt}.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch

from benchmarks import ceilings
from benchmarks.linked_set import BUCKETS, write_index_of, write_linked_set
from benchmarks.phases import STARTED_VARIABLE
from benchmarks.result_files import RESULTS, machine_line, write_result
from demo import pictures
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.optim.options import ADAFACTOR_RECIPE
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = 2**24

TRAINING = (
    "--max_train_steps=1 --seed=1 --full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor --max_grad_norm=0 "
    f"{ADAFACTOR_RECIPE} "
    "--gradient_checkpointing --max_data_loader_n_workers=0 --cache_latents --output_name=m"
)
VARIANTS: dict[str, list[str]] = {
    "captions encoded in each step": [],
    "captions cached in memory": ["--cache_text_encoder_outputs"],
    "captions cached on disk, for the first time": ["--cache_text_encoder_outputs_to_disk"],
    "captions found on disk": ["--cache_text_encoder_outputs_to_disk"],
}


def prepare(folder: Path, model: Path, side: int, num_pictures: int) -> None:
    """Write images with captions, metadata and latents."""
    images = folder / "images"
    assert pictures.main([str(images), f"--num_pictures={num_pictures}"]) == 0
    captions, latents = folder / "meta_cap.json", folder / "meta_lat.json"
    for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
        assert script.main([str(images), str(captions)]) == 0
    limits = [f"--max_resolution={side},{side}", f"--min_bucket_reso={side // 2}", f"--max_bucket_reso={side * 2}"]
    argv = [str(path) for path in (images, captions, latents, model)]
    assert prepare_buckets_latents.main([*argv, *limits]) == 0


def bytes_read_per_second(path: Path) -> float:
    """Return how fast the file can be read as it is, in the page cache or on the disk."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        block = bytearray(_BLOCK)
        while file.readinto(block):
            pass
    return path.stat().st_size / (time.perf_counter() - started)


def started_run(
    folder: Path, model: Path, side: int, flags: Sequence[str], *, without: Sequence[str] = ("whole run", "save")
) -> list[dict[str, Any]]:
    """Return the phases of one process, in the order in which they began."""
    figures = folder / "phases.json"
    command = [
        *(sys.executable, str(ROOT / "benchmarks/phases.py"), str(figures)),
        f"--pretrained_model_name_or_path={model}",
        f"--in_json={folder / 'meta_lat.json'}",
        f"--train_data_dir={folder / 'images'}",
        f"--output_dir={folder / 'output'}",
        f"--resolution={side},{side}",
        *(*TRAINING.split(), *flags),
    ]
    started = {STARTED_VARIABLE: str(time.time()), "THP_MEM_ALLOC_ENABLE": "1"}
    subprocess.run(command, env={**os.environ, **started}, check=True, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = json.loads(figures.read_text(encoding="utf-8"))
    return [row for row in rows if row["phase"] not in without]


def run(model: Path | None, side: int, num_pictures: int, num_variants: int) -> dict[str, Any]:
    """Return the ceilings, and the phases of the first `num_variants` variants."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = ceilings.measure(device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            model = folder / "tiny.safetensors"
            write_random_sdxl(model, TINY, torch.float16, seed=0)
        prepare(folder, model, side, num_pictures)
        read_rate = bytes_read_per_second(model)
        size = model.stat().st_size
        chosen = list(VARIANTS.items())[:num_variants]
        variants = {label: started_run(folder, model, side, flags) for label, flags in chosen}
    about = {"device": device.type, "side": side, "num_pictures": num_pictures, "model_bytes": size}
    ceiling = asdict(found) | {"bytes_read_per_second": read_rate}
    return {"machine": ceilings.machine(), **about, **ceiling, "variants": variants}


def run_large(
    model: Path | None, counts: Sequence[int], *, in_shards: bool = False, first_up_to: float = math.inf
) -> dict[str, Any]:
    """Return the phases of two starts on each of several sets, which differ in their number of images.

    Above `first_up_to` images the first start finds an index, as the preparation writes it.
    """
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        if model is None:
            model = Path(name) / "tiny.safetensors"
            write_random_sdxl(model, TINY, torch.float16, seed=0)
        digest = vae_digest(load_vae(str(model), None))
        for count in counts:
            folder = Path(name) / str(count)
            write_linked_set(folder, count, digest, in_shards=in_shards)
            _make_old(folder)
            labels = ["first" if count <= first_up_to else "index", "again"]
            if labels[0] == "index":
                write_index_of(folder, count)
            sets[str(count)] = {
                label: started_run(folder, model, BUCKETS[0].width, [], without=["save"]) for label in labels
            }
            shutil.rmtree(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"machine": ceilings.machine(), "device": device, "sets": sets}


def _make_old(folder: Path) -> None:
    """Set the times of all files back: the index does not know files that are younger than two seconds."""
    for path in [*folder.glob("*.*"), *folder.glob("*.shards/*")]:
        if path.is_file():
            os.utime(path, (1.7e9, 1.7e9 + 0.5))


def table_large(result: dict[str, Any]) -> str:
    """Return the starts on large sets as text: seconds of each phase, and the peak of the whole run."""
    lines = [
        machine_line(result["machine"]),
        "prepared latents of 96x96, batch 1. Seconds until the first step is done; in brackets, and for the phases,",
        "those of the processor, since other programs may run on the same cores. 'index': latents are known,",
        "images are searched for; 'again': both are known.",
        "",
        f"{'images':>9}  start  first step after     peak anonymous   find  captions    read   plan  header",
    ]
    for count, starts in result["sets"].items():
        for label, rows in starts.items():
            seconds = {row["phase"]: row["processor_s"] for row in rows}
            first = next(row for row in rows if row["phase"] == "optimizer step")
            peak = next(row["peak_gib"] for row in rows if row["phase"] == "whole run")
            parts = ("find images", "report captions", "read training set", "plan steps", "make header")
            find, captions, read, plan, header = (seconds[part] for part in parts)
            lines.append(
                f"{int(count):9}  {label}  {first['from_start_s'] + first['seconds']:7.1f} "
                f"({first['processor_from_start_s']:5.1f}) {peak:14.2f} GiB"
                f"  {find:5.2f}  {captions:8.2f}  {read:6.2f}  {plan:5.2f}  {header:6.2f}"
            )
    return "\n".join(lines) + "\n"


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        machine_line(result["machine"]),
        f"a model of {result['model_bytes'] / 1e9:.2f} GB, {result['num_pictures']} images at about "
        f"{result['side']}x{result['side']}, batch 1, on {result['device']}",
        f"ceilings: {result['matmul_flops'] / 1e12:.2f} TFLOP/s in matrix products, "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s in copies; reading the model's file at "
        f"{result['bytes_read_per_second'] / 1e9:.2f} GB/s takes "
        f"{result['model_bytes'] / result['bytes_read_per_second']:.1f} s",
    ]
    for label, rows in result["variants"].items():
        end = max(row["from_start_s"] + row["seconds"] for row in rows)
        lines += ["", f"{label}: first step done after {end:.1f} s"]
        for row in rows:
            lines.append(
                f"    {row['phase']:32} from {row['from_start_s']:7.2f} s   takes {row['seconds']:6.2f} s   "
                f"peak anonymous {row['peak_gib']:6.2f} GiB"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an SDXL checkpoint. Default: the tiny SDXL.")
    parser.add_argument("--side", type=int, default=128, help="pixels along the side of a square bucket")
    parser.add_argument("--num_pictures", type=int, default=12)
    parser.add_argument("--num_variants", type=int, default=len(VARIANTS))
    parser.add_argument("--num_images", type=int, nargs="+", help="start on prepared sets of these sizes")
    parser.add_argument(
        "--first_up_to", type=int, default=10**9, help="images up to which a start without index is run"
    )
    parser.add_argument("--shards", action="store_true", help="with --num_images: the latents are in shards")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.num_images:
        result = run_large(
            arguments.model, arguments.num_images, in_shards=arguments.shards, first_up_to=arguments.first_up_to
        )
        kind = "_shards" if arguments.shards else ""
        name = f"start_large{kind}_{'tiny' if arguments.model is None else 'full'}_{result['device']}"
        write_result(arguments.results / name, result, table_large(result))
        print(table_large(result))
        return 0
    result = run(arguments.model, arguments.side, arguments.num_pictures, arguments.num_variants)
    name = f"start_{'tiny' if arguments.model is None else 'full'}_{result['device']}"
    write_result(arguments.results / name, result, table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
