"""Measure finetune/prepare_buckets_latents.py: images per second, and the share of the time that the VAE is busy.

    python benchmarks/latents.py [--num_pictures 32] [--side 1024] [--size full]

Photographs larger than their bucket are written to a temporary folder and encoded by a VAE of random weights, with
several numbers of threads and batch sizes. The script is not changed: this process wraps the functions it calls. The
result goes to benchmarks/results/latents_<device>.{json,txt}. Needs scikit-image for its photographs.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import skimage.data
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from demo.random_sdxl import TINY
from finetune import prepare_buckets_latents
from library.data import latent_files, latent_preparation, latent_writing
from library.sdxl.architecture import ARCHITECTURE_KEY, SDXL_BASE, Architecture, empty_vae
from library.sdxl.latents import encode_pixels
from library.sdxl.tensor_file import TensorToWrite, write_safetensors
from library.sdxl.weight_names import vae_table

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
ENLARGED = 1.5
"""How much larger the images are than their bucket: as with most data, they are decoded and shrunk."""


@dataclass(frozen=True)
class Figures:
    """One run: seconds from the first image to the last, in the VAE and in writing; the latter two overlap."""

    variant: str
    num_pictures: int
    seconds: float
    vae_seconds: float
    writing_seconds: float

    @property
    def pictures_per_second(self) -> float:
        """Images per second of the whole run, without its start."""
        return self.num_pictures / self.seconds


class Stopwatch:
    """Adds up the seconds that wrapped functions take."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return `function` with its seconds added to those of `name`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            started = self._now()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

        return timed

    def wrapped_iterator(self, function: Callable[..., Iterator[Any]], name: str) -> Callable[..., Iterator[Any]]:
        """Return `function` with the seconds from its first item to its end as those of `name`."""

        def timed(*arguments: Any) -> Iterator[Any]:
            started = self._now()
            yield from function(*arguments)
            self.seconds[name] = self._now() - started

        return timed

    def _now(self) -> float:
        ceilings.wait(self._device)
        return time.perf_counter()


def make_set(folder: Path, num_pictures: int, side: int) -> None:
    """Write photographs as JPEG, each a little different, and metadata without captions."""
    size = round(side * ENLARGED)
    for number in range(num_pictures):
        pixels = getattr(skimage.data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])()
        image = Image.fromarray(pixels).resize((size, size + 8 * (number // len(PHOTOGRAPHS))))
        image.save(folder / f"{number:04}.jpg", quality=92)
    metadata = {f"{number:04}": {"captionL": "", "captionG": ""} for number in range(num_pictures)}
    (folder / "meta_cap.json").write_text(json.dumps(metadata), encoding="utf-8")


def write_random_vae(path: Path, architecture: Architecture) -> None:
    """Write a VAE of random weights in float16."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(architecture.vae)
    weights = vae.state_dict()
    tensors = []
    for stored in vae_table(vae):
        tensor = stored.from_parameters([weights[name] for name in stored.parameters])
        tensors.append(TensorToWrite(stored.name, tuple(tensor.shape), torch.float16, tensor.clone))
    write_safetensors(path, tensors, {ARCHITECTURE_KEY: architecture.to_json()})


def flops_of_an_image(architecture: Architecture, side: int) -> int:
    """Return the floating-point operations of encoding one image of `side` x `side` pixels."""
    with FlopCounterMode(display=False) as counter:
        encode_pixels(empty_vae(architecture), torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops()


def measured(folder: Path, vae: Path, side: int, variant: dict[str, object], device: torch.device) -> Figures:
    """Prepare all images of `folder` with the flags of `variant`."""
    for old in folder.glob("*.npz"):
        old.unlink()
    watch = Stopwatch(device)
    unwrapped = latent_preparation.encode_pixels_finite, latent_writing.write_cache
    read_and_write = latent_files._written
    latent_preparation.encode_pixels_finite = watch.wrapped(unwrapped[0], "vae")
    latent_writing.write_cache = watch.wrapped(unwrapped[1], "writing")
    latent_files._written = watch.wrapped_iterator(read_and_write, "all")
    flags = [f"--{name}={value}" for name, value in variant.items()]
    limits = [f"--max_resolution={side},{side}", f"--min_bucket_reso={side // 2}", f"--max_bucket_reso={side * 2}"]
    argv = [folder, folder / "meta_cap.json", folder / "meta_lat.json", vae, *limits, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert prepare_buckets_latents.main([str(argument) for argument in argv]) == 0
    finally:
        latent_preparation.encode_pixels_finite, latent_writing.write_cache = unwrapped
        latent_files._written = read_and_write
    num_pictures = len(list(folder.glob("*.npz")))
    return Figures(" ".join(flags), num_pictures, watch.seconds["all"], watch.seconds["vae"], watch.seconds["writing"])


def variants(precision: str) -> list[dict[str, object]]:
    """Return the flags of the runs: four threads, one thread, larger batches, float32."""
    base: dict[str, object] = {"mixed_precision": precision, "batch_size": 1, "max_data_loader_n_workers": 4}
    return [
        base,
        base | {"max_data_loader_n_workers": 1},
        base | {"batch_size": 4},
        *([] if precision == "no" else [base | {"mixed_precision": "no"}]),
    ]


def run(num_pictures: int, side: int, size: str, precision: str) -> dict[str, Any]:
    """Return the ceilings and the figures of all variants."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    architecture = SDXL_BASE if size == "full" else TINY
    found = ceilings.measure(device, dtype)
    flops = flops_of_an_image(architecture, side)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder, num_pictures, side)
        write_random_vae(folder / "vae.safetensors", architecture)
        measured(folder, folder / "vae.safetensors", side, variants(precision)[0], device)  # warms up
        for variant in variants(precision):
            figures = measured(folder, folder / "vae.safetensors", side, variant, device)
            rows.append(
                asdict(figures)
                | {
                    "pictures_per_second": figures.pictures_per_second,
                    "vae_share": figures.vae_seconds / figures.seconds,
                    "writing_share": figures.writing_seconds / figures.seconds,
                    "share_of_matmul": flops * num_pictures / figures.seconds / found.matmul_flops,
                }
            )
    about = {"device": device.type, "side": side, "size": size, "num_pictures": num_pictures}
    return {"machine": ceilings.machine(), **about, "flops_of_a_picture": flops, **asdict(found), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        machine_line(result["machine"]),
        f"{result['num_pictures']} images at about {result['side']}x{result['side']}, {result['size']} size, "
        f"{result['flops_of_a_picture'] / 1e12:.3f} TFLOP per image, on {result['device']}",
        f"ceilings: {result['matmul_flops'] / 1e12:.2f} TFLOP/s in matrix products, "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s in copies",
        "",
        f"{'flags':70}   images/s  of matmul rate  VAE busy  writing",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['variant']:70} {row['pictures_per_second']:10.2f} {row['share_of_matmul']:15.0%} "
            f"{row['vae_share']:9.1%} {row['writing_share']:8.1%}"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pictures", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="pixels along the side of a square bucket")
    parser.add_argument("--size", choices=["tiny", "full"], default="full", help="of the VAE")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="bf16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    result = run(arguments.num_pictures, arguments.side, arguments.size, arguments.precision)
    write_result(arguments.results / f"latents_{result['device']}", result, table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
