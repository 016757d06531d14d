"""What a launcher asks for happens or is refused: accelerate turns some of it into something else without a word."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from library.training.process_options import launch_problems


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not offered: choose plain multi-GPU"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor or context parallel"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, and --mixed_precision is bf16; pass"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "each process would train by itself"),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"},
            "FSDP, which is not offered: sharded weights could not be saved",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "FSDP"),
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


EXAMPLES = Path(__file__).parents[2] / "examples" / "many-gpus"


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("two_gpus", 1, 2), ("eight_gpus", 1, 8), ("two_nodes", 2, 16)]
)
def test_the_examples_ask_accelerate_for_what_the_page_says(name: str, machines: int, processes: int):
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert (config.distributed_type.value, config.mixed_precision) == ("MULTI_GPU", "bf16")
    assert list(launch_problems({"ACCELERATE_MIXED_PRECISION": config.mixed_precision}, "bf16")) == []
