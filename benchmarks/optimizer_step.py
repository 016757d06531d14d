"""Time the optimizer alone on weights with the shapes of SDXL's U-Net in bfloat16, and measure its state.

    python benchmarks/optimizer_step.py [--device cuda] [--variants ours flat ...]

Every variant steps the same weights with the same gradients a few times; the best step counts. Each weight must at
least be read and written, and its gradient read: 6 bytes.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as sdxl_train.py does, before torch is imported

import torch
from torch.nn import Parameter

from benchmarks.ceilings import machine, measure, wait
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.optim.optimizer_probe import keys_in_bfloat16
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, KAHAN, NEAREST, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.sdxl.architecture import SDXL_BASE, empty_unet

RECIPE = [*ADAFACTOR_RECIPE.split()[1:], "weight_decay=0.01"]
FLAT = [*RECIPE, "flatten_convolutions=True"]
VARIANTS: dict[str, tuple[str, list[str], str]] = {
    "transformers": ("transformers.optimization.Adafactor", RECIPE, NEAREST),
    "ours, nearest": ("Adafactor", RECIPE, NEAREST),
    "ours": ("Adafactor", RECIPE, STOCHASTIC),
    "ours, kahan": ("Adafactor", RECIPE, KAHAN),
    "flat, nearest": ("Adafactor", FLAT, NEAREST),
    "flat": ("Adafactor", FLAT, STOCHASTIC),
    "AdamW": ("AdamW", [], STOCHASTIC),
}
"""Name to optimizer, its arguments and the rounding."""

BYTES_AT_LEAST = 6
_STEPS = 3
_POOL_SIZE = 2**25


def timed(weights: list[Parameter], gradients: torch.Tensor, variant: str) -> dict[str, Any]:
    """Return the seconds of the best step, the nanoseconds per weight and the size of the state."""
    name, arguments, rounding = VARIANTS[variant]
    options = OptimizerOptions(optimizer_type=name, optimizer_args=arguments, learning_rate=1e-5)
    device = weights[0].device
    optimizer = make_optimizer([{"name": "unet", "params": weights, "lr": 1e-5}], options)
    narrow = keys_in_bfloat16(partial(make_optimizer, options=options), device)
    stepper = Stepper(optimizer, Rounder(rounding, weights, seed=0), narrow)
    seconds = []
    for step in range(1, _STEPS + 1):
        for weight in weights:
            weight.grad = gradients[: weight.numel()].view(weight.shape)
        wait(device)
        started = time.perf_counter()
        stepper.step(step)
        wait(device)
        seconds.append(time.perf_counter() - started)
        for weight in weights:
            weight.grad = None
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    num_weights = sum(weight.numel() for weight in weights)
    return {
        "variant": variant,
        "seconds": min(seconds),
        "first_seconds": seconds[0],
        "nanoseconds_a_weight": min(seconds) / num_weights * 1e9,
        "state_gib": sum(value.numel() * value.dtype.itemsize for value in kept) / 2**30,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:-1])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    ceilings = measure(device, torch.bfloat16)
    shapes = [parameter.shape for parameter in empty_unet(SDXL_BASE).parameters()]
    weights = [Parameter(torch.full(shape, 0.02, dtype=torch.bfloat16, device=device)) for shape in shapes]
    gradients = torch.randn(_POOL_SIZE, device=device).to(torch.bfloat16)
    num_weights = sum(weight.numel() for weight in weights)
    floor = BYTES_AT_LEAST * num_weights / ceilings.copy_bytes_per_second

    lines = [
        machine_line(machine()),
        f"{num_weights / 1e9:.2f} billion weights in bfloat16 on {device}; copies at "
        f"{ceilings.copy_bytes_per_second / 1e9:.1f} GB/s, so no step can take less than {floor:.2f} s",
        "",
        f"{'variant':<16}{'s/step':>8}{'first':>8}{'ns/weight':>11}{'state GiB':>11}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for variant in arguments.variants:
        row = timed(weights, gradients, variant)
        gc.collect()
        rows.append(row)
        lines.append(
            f"{variant:<16}{row['seconds']:8.2f}{row['first_seconds']:8.2f}{row['nanoseconds_a_weight']:11.2f}"
            f"{row['state_gib']:11.2f}"
        )
        print(lines[-1], flush=True)
    result = {"machine": machine(), "floor_seconds": floor, "rows": rows}
    write_result(arguments.output / f"optimizer_step_{device.type}", result, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
