"""What CUDA graphs cannot hold, from the options alone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.config.processes import share_of_process

if TYPE_CHECKING:
    from library.training.run_options import TrainingOptions

_FLAG = "--cuda_graphs"


def graph_conflicts(options: "TrainingOptions") -> Iterator[str]:
    """Yield what does not work with `--cuda_graphs`, one sentence each."""
    if not options.compilation.cuda_graphs:
        return
    optimizer = options.optimizer
    if optimizer.optimizer_type.lower() != "adafactor":
        yield f"{_FLAG} needs --optimizer_type=Adafactor: {optimizer.optimizer_type} takes its numbers from the host."
    if not optimizer.fused_backward_pass:
        yield f"{_FLAG} needs --fused_backward_pass: gradients that outlive the backward pass are not at one place."
    elif optimizer.max_grad_norm != 0:
        yield f"{_FLAG} needs --max_grad_norm=0: whether the norm is finite is read on the host."
    if not options.precision.full_bf16:
        yield f"{_FLAG} needs --full_bf16: autocast keeps copies of the weights between steps."
    refused = {
        "--train_text_encoder": (options.run.train_text_encoder, "only the U-Net's step is captured"),
        "--torch_compile": (options.compilation.torch_compile, "compiled blocks have not been tried in a graph"),
        "--offload_optimizer": (optimizer.offload_optimizer, "its state moves in every step"),
    }
    for flag, (is_set, reason) in refused.items():
        if is_set:
            yield f"{_FLAG} cannot work with {flag}: {reason}."
    if share_of_process().count > 1:
        yield f"{_FLAG} cannot work with several processes, which exchange gradients within the backward pass."
