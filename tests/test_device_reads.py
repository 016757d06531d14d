"""How often a training step reads a number from the device: on a GPU the host would wait there for what is computed."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    torch.ops.aten._local_scalar_dense,  # float(x), x.item(), bool(x)
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,  # and x[mask], which has as many elements as the mask has ones
    torch.ops.aten.masked_select,
)


class ReadCounter(TorchDispatchMode):
    """Counts, within the block, what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket in READS:
            self.reads[str(function)] += 1
        return function(*arguments, **(named or {}))


def reads_of_a_run(train, *flags):
    with ReadCounter() as counter:
        train(*flags)
    return counter.reads


def test_a_step_reads_its_loss_and_nothing_else(train):
    flags = ("--noise_offset=0.0357", "--adaptive_noise_scale=0.00357")
    short, long = (reads_of_a_run(train, *flags, f"--max_train_steps={steps}") for steps in (1, 2))
    assert long - short == Counter({"aten._local_scalar_dense.default": 1})
