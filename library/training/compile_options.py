"""Flags of the kernels that compute a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.config.options import option

DEFAULT_BACKEND = "inductor"


@dataclass(frozen=True)
class CompileOptions:
    """Compilation of the U-Net, and the choice of kernels."""

    _argument_group_name: ClassVar[str] = "Compilation"

    torch_compile: bool = option(
        False,
        "Compile the U-Net's blocks with torch.compile. The first steps take minutes; later ones are faster on a GPU.",
    )
    dynamo_backend: str = option(
        DEFAULT_BACKEND,
        "Backend of torch.compile; eager and aot_eager compile nothing and serve to find faults.",
        choices=(DEFAULT_BACKEND, "aot_eager", "eager"),
    )

    deterministic: bool = option(
        False,
        "Use only kernels that return the same bits in each run: slower on a GPU, where attention's backward pass "
        "differs in last bits otherwise. A CPU is deterministic without it.",
    )

    cuda_graphs: bool = option(
        False,
        "Replay steps as CUDA graphs, which a GPU runs without waiting for the host. Needs Adafactor and "
        "--fused_backward_pass with --full_bf16. No GPU has measured it yet.",
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.dynamo_backend != DEFAULT_BACKEND and not self.torch_compile:
            yield f"--dynamo_backend {self.dynamo_backend} has no effect without --torch_compile; add it."
