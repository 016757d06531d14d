"""Comparison 3: our file through diffusers' loaders, diffusers' folder through ours; every parameter equal.

(tests/sdxl/test_checkpoint_file.py has the file as it is published through ours, against diffusers' conversion.)
"""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, write_single_file
from library.sdxl.diffusers_folder import read_diffusers_folder

IN_PIPELINE = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder_l": "text_encoder",
    "text_encoder_g": "text_encoder_2",
}
FLOAT32 = ModelDtypes(*[torch.float32] * 4)


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> SdxlModel:
    """A model whose every parameter is another one's only by chance: biases, norms and all."""
    made = read_single_file(tiny_sdxl, FLOAT32)
    generator = torch.Generator().manual_seed(1)
    for network in IN_PIPELINE:
        for tensor in getattr(made, network).state_dict().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def our_file(model: SdxlModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as we write it."""
    path = tmp_path_factory.mktemp("models") / "ours.safetensors"
    write_single_file(path, model, None, {})
    return path


@pytest.fixture(scope="module")
def their_pipeline(our_file: Path, tiny_folder: Path) -> StableDiffusionXLPipeline:
    """Our file as diffusers reads it, with its own conversion of both text encoders."""
    return StableDiffusionXLPipeline.from_single_file(str(our_file), config=str(tiny_folder), torch_dtype=torch.float32)


def parameters_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by the names that all releases of transformers share."""
    return {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Exact: nothing is computed, only moved and renamed."""
    expected, found = parameters_of(theirs), parameters_of(ours)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("network", IN_PIPELINE)
def test_our_file_is_read_by_diffusers_as_it_was_written(model: SdxlModel, their_pipeline, network: str):
    assert_equal(getattr(model, network), getattr(their_pipeline, IN_PIPELINE[network]))


@pytest.mark.parametrize(("network", "loader"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_single_networks_are_read_out_of_our_file_too(model: SdxlModel, our_file, tiny_folder, network: str, loader):
    theirs = loader.from_single_file(
        str(our_file), config=str(tiny_folder), subfolder=network, torch_dtype=torch.float32
    )
    assert_equal(getattr(model, network), theirs)


def test_a_folder_that_diffusers_has_saved_is_read_as_the_same_model(model: SdxlModel, their_pipeline, tmp_path: Path):
    their_pipeline.save_pretrained(tmp_path / "theirs")
    read = read_diffusers_folder(str(tmp_path / "theirs"), FLOAT32)
    for network in IN_PIPELINE:
        assert_equal(getattr(read, network), getattr(model, network))
    assert read.architecture == model.architecture
