"""Peak memory of a GPU that keeps its part of SDXL's U-Net (FSDP2), with processes that are not there.

    python -m benchmarks.shared_memory --processes 2 8

One forward and one backward pass at full size in bfloat16 with gradient checkpointing, one image of 1024x1024.
Nothing is computed: tensors have shapes and no numbers (torch's FakeTensorMode), collectives return at once (its
"fake" backend), and torch's FSDPMemTracker adds up what is alive. The optimizer's state is arithmetic: 4 bytes a
number for AdamW. In the columns "fused" each gradient is freed as soon as it has arrived, as --fused_backward_pass does
once it has stepped a group of weights, and the state is Adafactor's, which is next to nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result_files import RESULTS, write_result

GIB = 2**30
_STATE_BYTES = 4  # AdamW's two moments in bfloat16


def main() -> int:
    """Measure each number of processes in a process, since a process group is made once; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--one", type=int, help="measure this number alone and print its figures")
    parser.add_argument("--fused", action="store_true", help="with --one: free each gradient at once")
    parser.add_argument("--output", type=Path, default=RESULTS / "shared_memory")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(arguments.one, fused=arguments.fused)))
        return 0
    rows = []
    for number, fused in [(number, fused) for fused in (False, True) for number in arguments.processes]:
        command = [sys.executable, "-m", "benchmarks.shared_memory", "--one", str(number)]
        command += ["--fused"] if fused else []
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(said.splitlines()[-1]))
        print(rows[-1], flush=True)
    write_result(arguments.output, {"gib": rows}, table_of(rows))
    return 0


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table, a line for each part."""
    lines = ["GiB at the peak of a forward and a backward pass, by number of processes"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines += [f"{name:<18}" + "".join(f"{row.get(name, 0):>10}" for row in rows) for name in names]
    return "\n".join(lines)


def measured(num_processes: int, *, fused: bool) -> dict[str, Any]:
    """Return the GiB of each part at the peak of a forward and a backward pass, and of the optimizer's state."""
    import torch
    import torch.distributed as dist
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from library.sdxl.architecture import SDXL_BASE
    from library.training.sharding import shard

    dist.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    mesh = init_device_mesh("cpu", (num_processes,))
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        unet = UNet2DConditionModel(**SDXL_BASE.unet)
        unet.train()
        unet.enable_gradient_checkpointing()
        num_numbers = sum(weight.numel() for weight in unet.parameters())
        shard(unet, mesh)
        for weight in unet.parameters() if fused else []:
            weight.register_post_accumulate_grad_hook(_free_gradient)
        inputs = torch.randn(1, 4, 128, 128), torch.zeros(1, dtype=torch.long), torch.randn(1, 77, 2048)
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.zeros(1, 6)}
        tracker = FSDPMemTracker(unet)
        with tracker:
            unet(*inputs, added_cond_kwargs=added).sample.float().square().mean().backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    parts = {str(getattr(kind, "value", kind)): round(size / GIB, 2) for kind, size in peak.items() if size}
    state = 0 if fused else _STATE_BYTES * num_numbers / num_processes / GIB
    total = round(parts["Total"] + state, 2)
    name = f"{num_processes} fused" if fused else str(num_processes)
    return {"processes": name, **parts, "state of AdamW": round(state, 2), "with the state": total}


def _free_gradient(weight: Any) -> None:
    weight.grad = None


if __name__ == "__main__":
    sys.exit(main())
