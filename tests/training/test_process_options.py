"""What a launcher asks for happens or is refused: accelerate turns some of it into something else without a word."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from library.training.process_options import asks_for_shards, launch_problems, num_copies, sharding_problems


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not offered: choose FSDP, version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, and --mixed_precision is bf16; pass"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "each process would train by itself"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "pass --torch_compile here"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "pass --gradient_accumulation_steps to this script alone"),
    ],
)
def test_what_would_not_happen_is_refused(environment: dict[str, str], problem: str):
    [found] = launch_problems(environment, "bf16")
    assert problem in found


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "", "ACCELERATE_MIXED_PRECISION": "no"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    ],
    ids=["one process", "off", "two processes"],
)
def test_what_happens_is_not(environment: dict[str, str]):
    assert list(launch_problems(environment, "bf16")) == []


SHARES = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
MESH = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"WORLD_SIZE": "1"}, "one process has nobody to share weights with; start two or more"),
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true; set it to false: weights stay on the GPUs"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "each process reads the model's file by itself"),
        ({"FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "set it to TRANSFORMER_BASED_WRAP"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "the units are BasicTransformerBlock"),
        ({"FSDP_IGNORED_MODULES": "norm"}, "all that is trained is sharded"),
        ({"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "states are written in shards, and models whole"),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "a parallelism_config HYBRID_SHARD"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "pass --gradient_checkpointing, too"),
        ({**MESH}, "2 copies of the model in 4 shards each; their product must be the number of processes, 2"),
        ({**MESH, "WORLD_SIZE": "8", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "TP_SIZE above 1"),
        ({**MESH, "ACCELERATE_USE_FSDP": "false"}, "a mesh of processes without FSDP"),
    ],
)
def test_shares_that_would_not_be_what_is_asked_for_are_refused(changed: dict[str, str], problem: str):
    [found] = sharding_problems(SHARES | changed, {}, checkpoints=False)
    assert problem in found


def test_what_is_shared_and_which_flags_cannot_be():
    assert list(sharding_problems({"WORLD_SIZE": "2"}, {"--flag": "it is not"}, checkpoints=False)) == []
    assert list(sharding_problems(SHARES | {"ACCELERATE_USE_CPU": "true"}, {}, checkpoints=False)) == []
    assert list(sharding_problems(SHARES | MESH | {"WORLD_SIZE": "8"}, {}, checkpoints=False)) == []
    [found] = sharding_problems(SHARES, {"--flag": "it is not"}, checkpoints=False)
    assert found == "--flag cannot work with FSDP: it is not. Leave it out, or choose plain multi-GPU."


EXAMPLES = Path(__file__).parents[2] / "examples" / "many-gpus"


@pytest.mark.parametrize("kind", ["", "_sharded"])
@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("two_gpus", 1, 2), ("eight_gpus", 1, 8), ("two_nodes", 2, 16)]
)
def test_the_examples_ask_accelerate_for_what_the_page_says(
    name: str, kind: str, machines: int, processes: int, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: processes // machines)
    argv = [f"--config_file={EXAMPLES / f'{name}{kind}.yaml'}", "sdxl_train.py"]
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert (asked.num_machines, asked.num_processes, asked.mixed_precision) == (machines, processes, "bf16")
    assert (asked.multi_gpu, asked.use_fsdp) == (not kind, bool(kind))
    environment = prepare_multi_gpu_env(asked) | {"WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
    assert asks_for_shards(environment) == bool(kind)
    assert num_copies(environment) == (machines if kind else 1)
    assert list(launch_problems(environment, "bf16")) == []
    assert list(sharding_problems(environment, {}, checkpoints=False)) == []
