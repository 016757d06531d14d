"""Compare the optimizers that have a name: bytes of state for each weight, and the time of a step on one CPU core.

    python benchmarks/optimizers.py [--names AdamW Muon ...]

State is that beside SDXL's U-Net in bfloat16: matrices, convolutions and vectors as many as it has. Time is processor
time of one core, the best of a few steps over the weights of two blocks of the U-Net, stochastic rounding included;
other programs on the machine hardly change it. Optimizers whose package is not installed are named and left out.
"""

import argparse
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch
from torch.nn import Parameter

from benchmarks.ceilings import machine
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.config.errors import UserError
from library.optim.known_optimizers import OPTIMIZERS, OptimizerKind
from library.optim.optimizer_probe import bytes_of_state_a_weight, keys_in_bfloat16, treats_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import ADAFACTOR_RECIPE, STOCHASTIC, OptimizerOptions
from library.optim.rounding import Rounder
from library.optim.stepping import Stepper
from library.sdxl.architecture import SDXL_BASE, empty_unet

BLOCKS = ("down_blocks.1.attentions.0.", "down_blocks.1.resnets.0.")
_CPU = torch.device("cpu")
_STEPS = 3


def options_of(kind: OptimizerKind) -> OptimizerOptions:
    """Return the options under which an optimizer is measured."""
    arguments = ADAFACTOR_RECIPE.split()[1:] if kind.name == "Adafactor" else []
    return OptimizerOptions(kind.name, arguments, learning_rate=1.0 if kind.one_rate else 1e-5)


def measured(kind: OptimizerKind, shapes: Sequence[torch.Size], counts: Counter[int]) -> dict[str, Any]:
    """Return a row: whether it steps in the backward pass, bytes of state and nanoseconds of a step for each weight."""
    make = partial(make_optimizer, options=options_of(kind))
    total = sum(counts.values())
    state = sum(count * bytes_of_state_a_weight(make, rank, torch.bfloat16, _CPU) for rank, count in counts.items())
    return {
        "name": kind.name,
        "package": kind.package,
        "fused": treats_each_alone(make, _CPU),
        "bytes_a_weight": state / total,
        "unet_gib": state / 2**30,
        "nanoseconds_a_weight": _seconds_of_step(make, kind, shapes) / sum(map(math.prod, shapes)) * 1e9,
    }


def _seconds_of_step(make: Any, kind: OptimizerKind, shapes: Sequence[torch.Size]) -> float:
    """Return the processor time of the best step."""
    weights = [Parameter(torch.full(shape, 0.02, dtype=torch.bfloat16)) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    optimizer = make([{"name": "unet", "params": weights, "lr": options_of(kind).learning_rate}])
    stepper_of = partial(Stepper, optimizer, Rounder(STOCHASTIC, weights, seed=0), keys_in_bfloat16(make, _CPU))
    stepper = stepper_of() if treats_each_alone(make, _CPU) else stepper_of(elements_per_chunk=math.inf)
    seconds = []
    for step in range(1, _STEPS + 1):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
        started = time.process_time()
        stepper.step(step)
        seconds.append(time.process_time() - started)
    return min(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kind.name for kind in OPTIMIZERS]
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    weights = dict(empty_unet(SDXL_BASE).named_parameters())
    shapes = [parameter.shape for name, parameter in weights.items() if name.startswith(BLOCKS)]
    counts: Counter[int] = Counter()
    for parameter in weights.values():
        counts[parameter.ndim] += parameter.numel()
    lines = [
        machine_line(machine()),
        f"one core; a step over {sum(map(math.prod, shapes)) / 1e6:.0f} million weights in bfloat16",
        "",
        f"{'optimizer':<26}{'package':<30}{'fused':<7}{'bytes/weight':>13}{'U-Net GiB':>11}{'ns/weight':>11}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for kind in OPTIMIZERS:
        if kind.name not in arguments.names:
            continue
        try:
            row = measured(kind, shapes, counts)
        except UserError as error:
            lines.append(f"{kind.name:<26}{error.problem}")
        else:
            rows.append(row)
            lines.append(
                f"{row['name']:<26}{row['package']:<30}{'yes' if row['fused'] else 'no':<7}"
                f"{row['bytes_a_weight']:13.2f}{row['unet_gib']:11.2f}{row['nanoseconds_a_weight']:11.2f}"
            )
        print(lines[-1], flush=True)
        gc.collect()
    write_result(arguments.output / "optimizers_cpu", {"machine": machine(), "rows": rows}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
