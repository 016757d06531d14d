"""The flags of several processes, and what their launcher asks for: whether it can happen is known before torch is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.config.magnitudes import DDP_TIMEOUT, MOST_MINUTES
from library.config.options import option

_YES = frozenset({"1", "true", "yes", "on", "y", "t"})
_ENGINES = {  # what accelerate sets, its name, and what to do instead
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "choose plain multi-GPU; --full_bf16, --fused_backward_pass and --offload_optimizer save memory",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "choose plain multi-GPU"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism configuration (tensor or context parallel)",
        "leave it out; the processes train as DDP",
    ),
    "ACCELERATE_USE_FSDP": (
        "FSDP",
        "sharded weights could not be saved; choose plain multi-GPU, with --full_bf16 and --fused_backward_pass",
    ),
}


@dataclass(frozen=True)
class ProcessOptions:
    """Several processes, one for each GPU, as `accelerate launch` and `torchrun` start them."""

    _argument_group_name: ClassVar[str] = "Several GPUs"

    ddp_timeout: float | None = option(
        None,
        f"Minutes that a process waits for the others in a step; then the main one saves. Default: {DDP_TIMEOUT:g}.",
        least=0,
        most=MOST_MINUTES,
    )
    ddp_gradient_as_bucket_view: bool = option(
        True,
        "Let gradients lie in the buffers that DDP exchanges, not beside them, which is always on: 4.8 GiB less for "
        "the U-Net in bfloat16.",
        choices=(True,),
    )
    ddp_static_graph: bool = option(
        False,
        "Tell DDP that every step uses the same weights, so that it exchanges their gradients in the order in which "
        "they are ready from the first step on.",
    )


def launch_problems(environment: Mapping[str, str], mixed_precision: str) -> Iterator[str]:
    """Yield what the launcher has asked for and would not happen, one sentence each."""
    for variable, (engine, instead) in _ENGINES.items():
        if environment.get(variable, "").lower() in _YES:
            yield f"accelerate is configured for {engine}, which is not offered: {instead}."
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("", "no", mixed_precision):
        yield (
            f"accelerate is configured for the mixed precision {asked}, and --mixed_precision is {mixed_precision}; "
            f"pass --mixed_precision={asked}, or --mixed_precision={mixed_precision} to `accelerate launch` too."
        )
    world = environment.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) < 1:
        yield f"WORLD_SIZE is '{world}'; the launcher must set it to the number of processes."
    elif int(world) > 1 and not environment.get("LOCAL_RANK", "").isdecimal():
        yield (
            f"WORLD_SIZE is {world} and LOCAL_RANK is not set: each process would train by itself. Start them with "
            "`accelerate launch` or `torchrun`."
        )
