"""What a launcher asks for happens or is refused: accelerate turns some of it into something else without a word."""

import pytest

from library.training.process_options import launch_problems


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not offered: run `accelerate config` again"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor or context parallel"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, and --mixed_precision is bf16; pass"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "each process would train by itself"),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}, "FSDP"),
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
