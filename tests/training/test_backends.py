"""How torch computes, as the options choose it."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from library.training.backends import choose_backends
from library.training.precision import PrecisionOptions

CPU = torch.device("cpu")
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"


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


def told(caplog: pytest.LogCaptureFixture, precision: PrecisionOptions, device: torch.device) -> list[tuple[int, str]]:
    caplog.set_level(logging.INFO, logger="library.training.backends")
    caplog.clear()
    choose_backends(precision, device, deterministic=False)
    return [(record.levelno, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize(
    ("reason", "level"),
    [
        (OLD_DRIVER, logging.WARNING),
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", logging.INFO),
    ],
)
def test_a_run_on_the_cpu_says_in_one_line_why_no_gpu_is_used(reason, level, monkeypatch, caplog):
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    [(found, message)] = told(caplog, PrecisionOptions(), CPU)
    assert found == level
    assert message == f"no GPU is used, training runs on the CPU: {' '.join(reason.split())}"


@pytest.mark.parametrize(("program", "level"), [("/usr/bin/nvidia-smi", logging.WARNING), (None, logging.INFO)])
def test_a_torch_without_cuda_is_named_where_there_is_a_card(program, level, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: program)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    [(found, message)] = told(caplog, PrecisionOptions(), CPU)
    assert found == level
    assert "built without CUDA; builds with it: https://pytorch.org" in message


def test_who_asks_for_the_cpu_is_told_nothing(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert told(caplog, PrecisionOptions(), CPU) == []


@pytest.mark.parametrize(
    ("mixed", "has_it", "is_warned"), [("bf16", False, True), ("bf16", True, False), ("fp16", False, False)]
)
def test_a_card_without_bfloat16_is_told_what_is_faster(mixed, has_it, is_warned, monkeypatch, caplog):
    about = SimpleNamespace(name="Tesla T4", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    said = told(caplog, PrecisionOptions(mixed_precision=mixed), torch.device("cuda", 0))
    warned = [message for level, message in said if level == logging.WARNING]
    assert bool(warned) == is_warned
    assert all("compute capability 7.5, 8.0 is needed" in each and "--mixed_precision=fp16" in each for each in warned)
