"""Settings of torch that it reads from the environment when it is imported."""

import os
import sys


def torch_environment() -> dict[str, str]:
    """Return what torch and its threads are to read, without what the user has set.

    Large tensors lie in huge pages, or the kernel spends longer handing out the memory of 3.5 billion weights than the
    disk spends reading them. Threads of OpenMP sleep between two loops: those that spin slow down every other program,
    and a second one of the same kind by an order of magnitude. On a GPU segments of memory grow, so that batches of
    other sizes leave no holes; Windows has no such segments.
    """
    settings = {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if sys.platform == "linux":
        settings["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {name: value for name, value in settings.items() if name not in os.environ}
