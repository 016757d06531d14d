"""The ceilings of a device and the facts of the machine: every benchmark compares its figures with these.

python benchmarks/ceilings.py [--device cuda]
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import psutil
import torch

from benchmarks.result_files import machine_line

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
_MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
_COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
_WARM_UPS = 3
_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large square matrix product, and bytes/s of a copy, counting reads and writes."""

    matmul_flops: float
    copy_bytes_per_second: float


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return the ceilings of `device` for `dtype`, with random numbers: zeros draw less power and run faster."""
    side = _MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    product_seconds = _seconds(lambda: torch.mm(left, right, out=product), device)

    source = torch.randint(0, 255, (_COPIED_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = _seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * side**3 / product_seconds, 2 * source.numel() / copy_seconds)


def machine() -> dict[str, str]:
    """Return what the figures depend on: date, devices, memory, versions."""
    found = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": f"{properties.total_memory / 2**30:.1f}",
            "cuda": str(torch.version.cuda),
        }
    return found | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of `operation` after a warm-up."""
    for _ in range(_WARM_UPS):
        operation()
    wait(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        operation()
    wait(device)
    return (time.perf_counter() - started) / _REPEATS


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine and its ceilings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args(argv).device)
    print(machine_line(machine()))
    for dtype in (torch.bfloat16, torch.float32):
        found = measure(device, dtype)
        print(f"{dtype}: {found.matmul_flops / 1e12:.3f} TFLOP/s, {found.copy_bytes_per_second / 1e9:.1f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
