"""Compiled kernels: damaged files are made again, and what is only tried compiles nothing."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from library.optim import kernels, vector_casts
from library.optim.kernel_cache import with_whole_kernels
from library.optim.optimizer_probe import keys_in_bfloat16, treats_each_alone
from library.optim.optimizers import make_optimizer
from library.optim.options import OptimizerOptions


def test_a_kernel_that_cannot_be_loaded_is_removed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kernel = tmp_path / "ab" / "cab.main.so"
    kernel.parent.mkdir()
    kernel.touch()  # as a killed process leaves it

    def compiled_and_loaded() -> str:
        if not kernel.exists():
            return "compiled"
        spec = importlib.util.spec_from_file_location("cab", kernel)
        assert spec is not None
        return str(importlib.util.module_from_spec(spec))

    with pytest.raises(ImportError, match="file too short"):
        compiled_and_loaded()
    assert with_whole_kernels(compiled_and_loaded)() == "compiled"
    assert f"the compiled kernel '{kernel}' was damaged" in capsys.readouterr().err


def test_files_elsewhere_are_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    library = tmp_path / "libnumbers.so"
    library.touch()

    def broken() -> None:
        raise ImportError(f"{library}: file too short")

    with pytest.raises(ImportError):
        with_whole_kernels(broken)()
    assert library.exists()


def test_an_error_that_quotes_the_command_of_a_compiler_is_raised_as_it_is(tmp_path: Path):
    def refused() -> None:
        raise OSError(f"error: /usr/bin/g++ {tmp_path}/kernel.cpp {'-D NAME=value ' * 40}-o {tmp_path}/kernel.so")

    with pytest.raises(OSError, match="error: /usr/bin"):
        with_whole_kernels(refused)()


USE_A_KERNEL = """
import torch
from library.config.messages import start_logging
from library.optim.kernels import compiled
start_logging()
print(float(compiled(lambda values: values * 3 + 1)(torch.ones(2**17)).sum()))
"""


@pytest.mark.slow
def test_a_process_runs_where_a_killed_one_has_left_empty_kernels(tmp_path: Path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def said() -> str:
        command = [sys.executable, "-c", USE_A_KERNEL]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout + ended.stderr

    first = said()
    kernels_made = list(tmp_path.rglob("*.main.so"))
    assert kernels_made
    for path in kernels_made:
        path.write_bytes(b"")
    again = said()
    assert "was damaged" in again
    assert str(4.0 * 2**17) in first
    assert str(4.0 * 2**17) in again


NO_VECTORS = """
from library.optim import kernels, vector_casts
vector_casts._cast_of_vector.__code__ = (lambda values, dtype, _: f"no_such_cast({values})").__code__
import torch
from library.optim.rounding import round_stochastically, stochastically_rounded
values = torch.randn(2**17)
assert torch.equal(round_stochastically(values, 3), stochastically_rounded(values, 3))
print("still compiled", kernels.why_not_compiled("cpu"))
"""


@pytest.mark.slow
def test_a_compiler_that_cannot_cast_vectors_compiles_as_before(tmp_path: Path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", NO_VECTORS]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "still compiled None" in ended.stdout, ended.stderr


def test_another_release_of_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.codegen.cpp import CppVecOverrides

    before = vars(CppVecOverrides)["to_dtype_bitcast"]
    monkeypatch.setattr(vector_casts, "_TORCH", "1.13")
    assert not vector_casts.use_vector_casts()
    assert vars(CppVecOverrides)["to_dtype_bitcast"] is before


@pytest.mark.parametrize("tried", [keys_in_bfloat16, treats_each_alone])
def test_trying_an_optimizer_compiles_nothing(tried, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_WORTH_COMPILING", 0)  # as on a GPU
    recipe = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=recipe)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tried(partial(make_optimizer, options=options), torch.device("cpu"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
