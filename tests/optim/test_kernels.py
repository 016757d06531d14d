"""Compiled kernels: damaged files are made again, and what is only tried compiles nothing."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from library.optim import kernels
from library.optim.kernels import compiled
from library.optim.optimizer_probe import keys_in_bfloat16, treats_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import OptimizerOptions

LARGE = 2**17


def forget_kernels() -> None:
    """As in a process that has compiled nothing: what is on disk is read again."""
    torch._dynamo.reset()
    torch._inductor.codecache.CppPythonBindingsCodeCache.cache_clear()
    torch._inductor.codecache.PyCodeCache.cache_clear()


@pytest.mark.heavy
def test_a_kernel_that_a_killed_process_left_empty_is_compiled_again(capsys: pytest.CaptureFixture[str]):
    folder, number = Path(cache_dir()), time.time()  # no run before this one has compiled it

    def multiplied(values: torch.Tensor) -> torch.Tensor:
        return values * number + 1

    values, before = torch.arange(LARGE, dtype=torch.float32), set(folder.rglob("*.main.so"))
    forget_kernels()
    compiled(multiplied)(values)
    made = set(folder.rglob("*.main.so")) - before
    assert made
    for path in made:  # another file in its place: the one that was loaded is still mapped
        path.unlink()
        path.touch()
    forget_kernels()
    torch.testing.assert_close(compiled(multiplied)(values), multiplied(values))
    assert "was damaged, as a killed process leaves it" in capsys.readouterr().err
    for path in made:
        path.unlink()


@pytest.mark.parametrize("tried", [keys_in_bfloat16, treats_each_alone])
def test_trying_an_optimizer_compiles_nothing(tried, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_WORTH_COMPILING", 0)  # as on a GPU
    recipe = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=recipe)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tried(partial(make_optimizer, options=options), torch.device("cpu"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
