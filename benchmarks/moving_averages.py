"""Time the update of a moving average on weights with the shapes of SDXL's U-Net, beside the speed of a copy.

    python benchmarks/moving_averages.py [--share 0.25] [--device cuda]

An update reads and writes the average and reads the weights: 6 bytes a weight where both are bfloat16, 10 where the
average is float32 beside bfloat16 weights, 12 where both are float32. `--share` takes a part of the U-Net's tensors;
seconds are then those of the whole by the number of weights. The best of the updates counts, and the best of as many
copies beside them. On a CPU all seconds are processor time of one thread, which others on the machine change least.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as sdxl_train.py does, before torch is imported

import torch

from benchmarks.ceilings import machine, wait
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.optim.ema import MovingAverage
from library.optim.ema_profiles import Decay
from library.sdxl.architecture import SDXL_BASE, empty_unet

VARIANTS = {
    "bf16 beside bf16": (torch.bfloat16, torch.bfloat16),
    "float32 beside bf16": (torch.float32, torch.bfloat16),
    "float32 beside float32": (torch.float32, torch.float32),
}
"""Name to the precision of the average and of the weights."""

_REPEATS = 30
_COPIED_BYTES = 2**27


def copy_rate(device: torch.device) -> float:
    """Return the bytes read and written in a second by the fastest of some copies."""
    source = torch.randint(0, 255, (_COPIED_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / min(_seconds(lambda: target.copy_(source), device) for _ in range(_REPEATS))


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    started = clock()
    operation()
    wait(device)
    return clock() - started


def timed(shapes: Sequence[torch.Size], variant: str, device: torch.device, every: int) -> dict[str, Any]:
    """Return nanoseconds and bytes a weight of the best update, and of lending the average and taking it back."""
    dtype, weights_dtype = VARIANTS[variant]
    weights = [torch.full(shape, 0.02, dtype=weights_dtype, device=device) for shape in shapes]
    average = MovingAverage(weights, Decay(0.999), dtype, device, seed="0")
    average.begin(0)
    steps = range(every, every * (_REPEATS + 1), every)
    seconds = [_seconds(partial(average.update, step), device) for step in steps]
    lent_seconds = min(_seconds(partial(_lend, average), device) for _ in range(_REPEATS // 3))
    num_weights = sum(weight.numel() for weight in weights)
    return {
        "variant": variant,
        "bytes_a_weight": 2 * dtype.itemsize + weights_dtype.itemsize,
        "nanoseconds_a_weight": min(seconds) / num_weights * 1e9,
        "first_seconds": seconds[0],
        "lent_nanoseconds_a_weight": lent_seconds / num_weights * 1e9,
    }


def _lend(average: MovingAverage) -> None:
    with average.lent():
        pass


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--share", type=float, default=1.0, help="part of the U-Net's tensors")
    parser.add_argument("--every", type=int, default=1, help="steps from update to update")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    everything = [parameter.shape for parameter in empty_unet(SDXL_BASE).parameters()]
    shapes = everything[:: max(1, round(1 / arguments.share))]
    num_weights = sum(shape.numel() for shape in everything)
    part = sum(shape.numel() for shape in shapes)
    about = machine() | {"load": f"{os.getloadavg()[0]:.1f}"}
    lines = [
        machine_line(about),
        f"{num_weights / 1e9:.2f} billion weights of the U-Net on {device}, measured on {part / 1e9:.2f} billion; "
        f"an update in {arguments.every} steps",
        "",
        f"{'average':<24}{'bytes':>7}{'copy s':>9}{'update s':>10}{'s/step':>9}{'of copy':>9}{'lend s':>8}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for variant in arguments.variants:
        row = timed(shapes, variant, device, arguments.every)
        rate = copy_rate(device)  # beside each
        copied = row["bytes_a_weight"] * num_weights / rate
        update = row["nanoseconds_a_weight"] * num_weights / 1e9
        lent = row["lent_nanoseconds_a_weight"] * num_weights / 1e9
        rows.append({**row, "copy_bytes_per_second": rate})
        lines.append(
            f"{variant:<24}{row['bytes_a_weight']:7}{copied:9.2f}{update:10.2f}{update / arguments.every:9.2f}"
            f"{copied / update:9.0%}{lent:8.2f}"
        )
        print(lines[-1], flush=True)
    result = {"machine": about, "num_weights": num_weights, "measured": part, "every": arguments.every, "rows": rows}
    write_result(arguments.output / f"moving_averages_{device.type}", result, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
