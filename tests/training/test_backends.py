"""How torch computes, as the options choose it."""

import pytest
import torch

from library.training.backends import choose_backends
from library.training.precision import PrecisionOptions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    choose_backends(PrecisionOptions(), CPU, deterministic=False)


def test_a_deterministic_run_uses_kernels_that_repeat(monkeypatch: pytest.MonkeyPatch):
    choose_backends(PrecisionOptions(), CPU, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    choose_backends(PrecisionOptions(), CPU, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("mixed", "expected"), [("no", "ieee"), ("bf16", "tf32")])
def test_float32_is_rounded_to_tf32_only_beside_narrower_products(mixed: str, expected: str):
    choose_backends(PrecisionOptions(mixed_precision=mixed), CPU, deterministic=False)
    assert torch.backends.cuda.matmul.fp32_precision == expected
    assert torch.backends.cudnn.conv.fp32_precision == expected
