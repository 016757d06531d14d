"""What the tests of models share: a checkpoint in which a mistaken name shows, and a disk that is full."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder

POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
FULL_AFTER_BYTES = 1_000_000


@pytest.fixture(scope="session")
def sdxl_metadata(tiny_sdxl: Path) -> dict[str, str]:
    """The header of the tiny SDXL, which holds its architecture."""
    with safe_open(tiny_sdxl, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="session")
def sdxl_file(tiny_sdxl: Path, sdxl_metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with noise on every tensor, so that none can pass for another, and with `position_ids`.

    (As it is drawn, all its biases are zero and all its norms one.) Not to be written to.
    """
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + (0.1 * torch.randn(tensor.shape, generator=generator)).half()
        for name, tensor in load_file(tiny_sdxl).items()
    }
    tensors[POSITION_IDS] = torch.arange(77)[None]
    path = tmp_path_factory.mktemp("noisy models") / "noisy sdxl.safetensors"
    save_file(tensors, path, sdxl_metadata)
    return path


@pytest.fixture
def sdxl_tensors(sdxl_file: Path) -> dict[str, torch.Tensor]:
    """The tensors of `sdxl_file` less `position_ids`, the dictionary free to be changed."""
    tensors = load_file(sdxl_file)
    del tensors[POSITION_IDS]
    return tensors


@pytest.fixture(scope="session")
def sdxl_model(sdxl_file: Path) -> SdxlModel:
    """The model of `sdxl_file` in its own precision, float16; not to be changed."""
    return read_single_file(sdxl_file, ModelDtypes())


@pytest.fixture(scope="session")
def sdxl_folder(sdxl_model: SdxlModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sdxl_model` as a diffusers folder; not to be written to."""
    folder = tmp_path_factory.mktemp("folders") / "noisy sdxl"
    write_diffusers_folder(folder, sdxl_model, None)
    return folder


@pytest.fixture(scope="session")
def diffusers_pipeline(sdxl_file: Path, sdxl_folder: Path) -> StableDiffusionXLPipeline:
    """The model of `sdxl_file` as diffusers converts it, in float32: the reference."""
    return StableDiffusionXLPipeline.from_single_file(
        str(sdxl_file), config=str(sdxl_folder), torch_dtype=torch.float32
    )


@pytest.fixture
def full_disk() -> AbstractContextManager[None]:
    """Inside this block no file can grow beyond a megabyte."""
    resource = pytest.importorskip("resource", reason="limits on files are POSIX")

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AFTER_BYTES, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited()
