"""Time training steps of a full-size SDXL with random weights: a plain loop, then the trainer with more and more flags.

    python benchmarks/training_step.py                                     every variant, batch size 1, 1024x1024
    python benchmarks/training_step.py --device cpu --resolution 256       the same on the CPU
    python benchmarks/training_step.py --nine_minutes --output FOLDER      what fits into ten minutes of a GPU

No file is needed: weights and latents are random. sdxl_train.py itself is timed, with the flags of a variant. Every row
runs in a separate process; one that fails becomes a row that says why. Table and JSON are written after each row, so
that an interrupted run keeps its results. Batches of mixed buckets are timed last.

`--nine_minutes` needs no network. Where torch, transformers, accelerate, numpy, pillow, psutil, safetensors, tqdm and
tensorboard are installed, it needs these wheels beside them, 9 MB: diffusers, open_clip_torch, ftfy, wcwidth,
tomli_w. open_clip is never imported, only its vocabulary is read; its requirements are not needed.

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/training_step.py --nine_minutes --output FOLDER
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/
# Read by torch: asking whether there is a GPU must not begin to use it in the process that the others are forked from.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from benchmarks.result_files import RESULTS, machine_line, write_result
from benchmarks.timed_run import Plan, write_ceilings, write_figures
from library.optim.options import ADAFACTOR_RECIPE
from library.sdxl.sizes import Size

_FUSED = ("--gradient_checkpointing", "--fused_backward_pass")
_CACHED = (*_FUSED, "--cache_text_encoder_outputs")
_FLAT = (*ADAFACTOR_RECIPE.split(), "weight_decay=0.01", "flatten_convolutions=True")
VARIANTS: dict[str, tuple[str, ...] | None] = {
    "plain": None,
    "ours": ("--gradient_checkpointing",),
    "fused": _FUSED,
    "text_cache": _CACHED,
    "compile": (*_CACHED, "--torch_compile"),
    "no_checkpointing": _CACHED[1:],
    "no_checkpointing_compile": (*_CACHED[1:], "--torch_compile"),
    "channels_last": _CACHED,
    "nearest": (*_CACHED, "--bf16_rounding=nearest"),
    "kahan": (*_CACHED, "--bf16_rounding=kahan"),
    "flat": (*_CACHED, *_FLAT),
    "flat_warm_up": (*_CACHED, *_FLAT, "--lr_scheduler=cosine", "--lr_warmup_steps=0.5"),
    "flat_graphs": (*_CACHED, *_FLAT, "--cuda_graphs"),
    "flat_deterministic": (*_CACHED, *_FLAT, "--deterministic"),
    "flat_nearest": (*_CACHED, *_FLAT, "--bf16_rounding=nearest"),
}
"""Name to the flags after the recipe; None is the plain loop of diffusers' examples.

"channels_last" is an experiment, not a flag: the memory format of the U-Net's weights.
"""

_COLUMNS = {
    "variant": "variant",
    "batch_size": "batch",
    "size": "size",
    "ms_per_image": "ms/image",
    "images_per_s": "images/s",
    "tflops": "TFLOP/s",
    "share_of_matmul": "share",
    "peak_gib": "peak GiB",
    "reserved_gib": "reserved",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "text_ms": "text",
    "rest_ms": "rest",
    "idle_ms": "idle",
    "waits": "waits",
    "launches": "launches",
    "first_step_s": "first s",
}
LEGEND = """
Milliseconds are per step. TFLOP/s and share count three forward passes of the U-Net; recomputation by gradient
checkpointing does not count. rest: data, noise, logging, waiting. idle: the GPU computes nothing. waits: how often the
host waits for the GPU in a step. launches: kernels and copies of a step. peak: GPU memory allocated by torch, or
anonymous memory on the CPU.
"""


def mixed_buckets(resolution: int) -> tuple[Size, ...]:
    """Return four buckets of about the area of `resolution` squared."""
    cell = resolution // 16
    return tuple(Size(cell * width, cell * height) for width, height in ((16, 16), (13, 19), (19, 13), (14, 18)))


def plans(arguments: argparse.Namespace) -> list[Plan]:
    """Return the rows in the order of their runs: those that compile, and take longest, last."""
    square = (Size(arguments.resolution, arguments.resolution),)
    mix = mixed_buckets(arguments.resolution)

    def plan(variant: str, batch_size: int, buckets: tuple[Size, ...]) -> Plan:
        return Plan(
            variant=variant,
            flags=VARIANTS[variant],
            batch_size=batch_size,
            buckets=buckets,
            device=arguments.device,
            model_size=arguments.model_size,
            num_warm_up=arguments.num_warm_up * len(buckets),
            num_measured=arguments.num_steps * len(buckets),
            channels_last=variant == "channels_last",
        )

    first, *others = arguments.batch_sizes
    compared = [name for name in arguments.compared if name in arguments.variants]
    found = [plan(variant, first, square) for variant in arguments.variants]
    found += [plan(variant, size, square) for size in others for variant in compared]
    if arguments.mix:
        found += [plan(variant, first, mix) for variant in compared]
    return sorted(found, key=lambda each: "--torch_compile" in (each.flags or ()))


# -- running ----------------------------------------------------------------------------------------------------------


class Rows:
    """The result so far; every added row is written to the disk at once."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self._path = path
        self._about = about
        self._rows: list[dict[str, Any]] = []
        print(_heading(about), flush=True)

    def add(self, plan: Plan, figures: dict[str, Any]) -> None:
        """Add a row, with the values that follow from its figures."""
        row = {
            "variant": plan.variant,
            "flags": None if plan.flags is None else " ".join(plan.flags),
            "batch_size": plan.batch_size,
            "size": "mix" if len(plan.buckets) > 1 else str(plan.buckets[0]),
            **figures,
        }
        if "step_ms" in figures:
            flops_per_s = figures["flops"] / figures["step_ms"] * 1e3
            row |= {
                "ms_per_image": figures["step_ms"] / figures["pictures"],
                "images_per_s": figures["pictures"] / figures["step_ms"] * 1e3,
                "tflops": flops_per_s / 1e12,
                "share_of_matmul": flops_per_s / self._about["matmul_flops"],
            }
        self._rows.append({key: _rounded(value) for key, value in row.items()})
        print(_line(self._rows[-1]), flush=True)
        table = [_heading(self._about), *map(_line, self._rows), LEGEND]
        write_result(self._path, self._about | {"rows": self._rows}, "\n".join(table))


def run_apart(function: Callable[..., None], *arguments: Any, seconds: float | None, method: str) -> dict[str, Any]:
    """Return what `function(*arguments, folder, path)` writes to `path` in a separate process."""
    with tempfile.TemporaryDirectory(prefix="training_step_") as folder:
        path = Path(folder) / "figures.json"
        place = (Path(folder), path) if function is write_figures else (path,)
        process = _context(method).Process(target=function, args=(*arguments, *place))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return {"note": "not finished: out of time"}
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        log = Path(folder) / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return {"note": f"exit status {process.exitcode}: {said}"}


def _context(method: str) -> Any:
    return multiprocessing.get_context(method)  # whose type depends on the method


def measure_all(arguments: argparse.Namespace) -> Path:
    """Run every plan while there is time; return the path of the results without suffix."""
    deadline = time.monotonic() + arguments.time_limit_s
    buckets = tuple(dict.fromkeys(bucket for plan in plans(arguments) for bucket in plan.buckets))
    method, about = _start(arguments, buckets)
    about["command"] = " ".join(["python", "benchmarks/training_step.py", *arguments.words])
    path = arguments.output / f"training_step_{arguments.device}"
    rows, longest = Rows(path, about), 0.0
    for plan in plans(arguments):
        plan = replace(plan, forward_flops=tuple(about["forward_flops"][str(bucket)] for bucket in plan.buckets))
        left = deadline - time.monotonic()
        if left < longest:
            rows.add(plan, {"note": "not run: out of time"})
            continue
        begun = time.monotonic()
        seconds = None if left == float("inf") else left
        rows.add(plan, run_apart(write_figures, plan, seconds=seconds, method=method))
        longest = max(longest, time.monotonic() - begun)
    return path


def _start(arguments: argparse.Namespace, buckets: Sequence[Size]) -> tuple[str, dict[str, Any]]:
    """Return how processes are started, and machine and ceilings. Forked if that works, since imports take seconds."""
    methods = [name for name in ("forkserver", "spawn") if name in multiprocessing.get_all_start_methods()]
    for method in methods:
        if method == "forkserver":
            _context(method).set_forkserver_preload(["benchmarks.timed_run"])
        about = run_apart(write_ceilings, arguments.device, arguments.model_size, buckets, seconds=None, method=method)
        if "note" not in about:
            return method, about
        print(f"processes by '{method}': {about['note']}", file=sys.stderr)
    raise SystemExit(f"no process could measure the ceilings of '{arguments.device}'")


# -- the table --------------------------------------------------------------------------------------------------------


def _heading(about: dict[str, Any]) -> str:
    ceilings = (
        f"matrix product {about['matmul_flops'] / 1e12:.3f} TFLOP/s, copy {about['copy_bytes_per_second'] / 1e9:.1f} "
        f"GB/s (read and written); U-Net forward, one image, TFLOP: "
        + ", ".join(f"{bucket} {flops / 1e12:.3f}" for bucket, flops in about["forward_flops"].items())
    )
    return "\n".join([machine_line(about["machine"]), ceilings, "", _cells(_COLUMNS)])


def _line(row: dict[str, Any]) -> str:
    if "note" in row:
        return (
            _cells({key: row[key] for key in ("variant", "batch_size", "size")}).rstrip()
            + f"  {' '.join(row['note'].split())}"
        )
    return _cells(row)


def _cells(row: Mapping[str, Any]) -> str:
    widths = {"variant": 25, "size": 10}
    return " ".join(f"{row.get(key, ''):>{widths.get(key, 9)}}" for key in _COLUMNS)


def _rounded(value: Any) -> Any:
    """Return a figure with four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line; `words` is the command line as typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model_size", choices=["full", "tiny"], default="full")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels along a side, a multiple of 128")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="every variant runs with the first")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--compared",
        nargs="+",
        choices=VARIANTS,
        default=["plain", "text_cache", "compile"],
        help="variants for other batch sizes and buckets",
    )
    parser.add_argument("--mix", action="store_true", help="also batches of mixed buckets")
    parser.add_argument("--num_warm_up", type=int, default=3, help="untimed steps per bucket")
    parser.add_argument("--num_steps", type=int, default=10, help="timed steps per bucket")
    parser.add_argument("--time_limit_s", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for table and JSON")
    parser.add_argument("--nine_minutes", action="store_true", help="batch sizes 1 2 4 8, mixed buckets, a time limit")
    arguments = parser.parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    if arguments.nine_minutes:
        arguments.batch_sizes, arguments.mix, arguments.time_limit_s = [1, 4, 8, 2], True, 515.0
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    path = measure_all(parse(argv))
    print(LEGEND, path.with_suffix(".json"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
