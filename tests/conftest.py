"""What many tests share: the tiny SDXL, and pictures to train it on."""

from pathlib import Path

import pytest
import torch

from demo.random_sdxl import TINY, write_random_sdxl

GOLDEN = Path("../shared/golden")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run_slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run_slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: --run_slow"))


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of all recorded reference values; what must always be checked has a copy in tests/golden."""
    folder = Path(__file__).resolve().parents[1] / GOLDEN
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of SDXL's skeleton in small widths and random weights, float16; not to be written to."""
    path = tmp_path_factory.mktemp("models") / "tiny_sdxl.safetensors"
    write_random_sdxl(path, TINY, torch.float16, seed=0)
    return path
