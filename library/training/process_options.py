"""The flags of several processes, and what their launcher asks for: whether it can happen is known before torch is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.config.magnitudes import DDP_TIMEOUT, MOST_MINUTES
from library.config.options import option

UNITS = frozenset({"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"})
"""Classes of modules whose weights are gathered together for their turn; what is outside of all is one more unit."""

_YES = frozenset({"1", "true", "yes", "on", "y", "t"})
_FSDP = "ACCELERATE_USE_FSDP"
_MESH = "PARALLELISM_CONFIG_"
_ENGINES = {  # what accelerate sets, its name, and what to do instead
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "choose FSDP, version 2, which shards weights, gradients and the optimizer's state as ZeRO step 3 does",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "choose FSDP, version 2, or plain multi-GPU"),
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


def asks_for_shards(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher asks for FSDP."""
    return _is_on(environment, _FSDP)


def reshards(environment: Mapping[str, str]) -> bool:
    """Return whether gathered weights are freed after the forward pass, and gathered once more for the backward one."""
    return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in _YES


def num_copies(environment: Mapping[str, str]) -> int:
    """Return over how many groups of processes the weights are the same; within each they are sharded."""
    if not _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    return int(environment.get(f"{_MESH}DP_REPLICATE_SIZE", "1"))


def num_parts(environment: Mapping[str, str]) -> int:
    """Return into how many parts weights are divided, of which a process keeps one."""
    if not asks_for_shards(environment):
        return 1
    return int(environment.get("WORLD_SIZE", "1")) // num_copies(environment)


def sharding_problems(
    environment: Mapping[str, str], refused: Mapping[str, str], *, checkpoints: bool
) -> Iterator[str]:
    """Yield what cannot be sharded as it is asked for, one sentence each.

    `refused` has flags that are set and cannot work then, with the reason; `checkpoints` says whether the run has
    gradient checkpointing.
    """
    if not asks_for_shards(environment):
        if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
            yield "accelerate is configured for a mesh of processes without FSDP; add it, version 2, or leave it out."
        return
    if environment.get("WORLD_SIZE", "1") == "1":
        yield "accelerate is configured for FSDP, and one process has nobody to share weights with; start two or more."
    asked = {name.removeprefix("FSDP_").lower(): value for name, value in environment.items()}
    for name, (is_built, instead) in _BUILT.items():
        value = asked.get(name, "").strip().lower()
        if value and value != "none" and not is_built(value):
            yield f"accelerate is configured with fsdp_{name}: {asked[name]}; {instead}."
    if asked.get("version", "1") != "2":
        yield "accelerate is configured for FSDP version 1; set fsdp_version: 2."
    if asked.get("activation_checkpointing", "").lower() in _YES and not checkpoints:
        yield "accelerate is configured with fsdp_activation_checkpointing; pass --gradient_checkpointing, too."
    yield from _mesh_problems(environment)
    for flag, reason in refused.items():
        yield f"{flag} cannot work with FSDP: {reason}. Leave it out, or choose plain multi-GPU."


def _mesh_problems(environment: Mapping[str, str]) -> Iterator[str]:
    if not _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if environment.get(f"{_MESH}{name}", "1") != "1":
            yield f"accelerate is configured with {_MESH}{name} above 1; only copies and shards of the model are built."
    sizes = [environment.get(f"{_MESH}DP_{name}_SIZE", "1") for name in ("REPLICATE", "SHARD")]
    world = environment.get("WORLD_SIZE", "1")
    if not all(size.isdecimal() and int(size) for size in sizes) or str(int(sizes[0]) * int(sizes[1])) != world:
        yield (
            f"accelerate is configured for {sizes[0]} copies of the model in {sizes[1]} shards each; their product "
            f"must be the number of processes, {world}."
        )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in _YES


def _is_no(value: str) -> bool:
    return value not in _YES


_BUILT: Mapping[
    str, tuple[Callable[[str], bool], str]
] = {  # which values are what is built, and what to do about others
    "offload_params": (_is_no, "set it to false: weights stay on the GPUs, --offload_optimizer moves the rest"),
    "activation_checkpointing_offload": (_is_no, "set it to false"),
    "cpu_ram_efficient_loading": (_is_no, "set it to false: each process reads the model's file by itself"),
    "forward_prefetch": (_is_no, "set it to false: a unit is gathered when the one before it is launched"),
    "auto_wrap_policy": (
        lambda value: value == "transformer_based_wrap",
        "set it to TRANSFORMER_BASED_WRAP: blocks of the networks are gathered one after another",
    ),
    "transformer_cls_to_wrap": (
        lambda value: {each.strip() for each in value.split(",")} <= {each.lower() for each in UNITS},
        f"leave it out: the units are {', '.join(sorted(UNITS))}",
    ),
    "ignored_modules": (lambda value: False, "leave it out: all that is trained is sharded"),
    "state_dict_type": (
        lambda value: value == "sharded_state_dict",
        "set it to SHARDED_STATE_DICT: states are written in shards, and models whole",
    ),
    "sharding_strategy": (
        lambda value: value in ("1", "full_shard"),
        "leave it out: fsdp_reshard_after_forward: false is SHARD_GRAD_OP, a parallelism_config HYBRID_SHARD",
    ),
}


def launch_problems(environment: Mapping[str, str], mixed_precision: str) -> Iterator[str]:
    """Yield what the launcher has asked for and would not happen, one sentence each."""
    for variable, (engine, instead) in _ENGINES.items():
        if _is_on(environment, variable):
            yield f"accelerate is configured for {engine}, which is not offered: {instead}."
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("", "no", mixed_precision):
        yield (
            f"accelerate is configured for the mixed precision {asked}, and --mixed_precision is {mixed_precision}; "
            f"pass --mixed_precision={asked}, or --mixed_precision={mixed_precision} to `accelerate launch` too."
        )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        yield "accelerate is configured to compile (dynamo_backend); set it to no, and pass --torch_compile here."
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        yield (
            "accelerate is configured to accumulate gradients, which would divide them twice; pass "
            "--gradient_accumulation_steps to this script alone."
        )
    world = environment.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) < 1:
        yield f"WORLD_SIZE is '{world}'; the launcher must set it to the number of processes."
    elif int(world) > 1 and not environment.get("LOCAL_RANK", "").isdecimal():
        yield (
            f"WORLD_SIZE is {world} and LOCAL_RANK is not set: each process would train by itself. Start them with "
            "`accelerate launch` or `torchrun`."
        )
