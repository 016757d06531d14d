"""SDXL as a diffusers folder: diffusers opens ours, we open it again, and half a folder is no model."""

import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from library.config.errors import UserError
from library.sdxl.checkpoint_file import ModelDtypes
from library.sdxl.diffusers_folder import read_diffusers_folder, read_diffusers_vae, write_diffusers_folder
from library.sdxl.tokenizers import PAD_G, PAD_L, tokenize

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
NETWORKS = ["unet", "vae", "text_encoder_l", "text_encoder_g"]


def assert_same(network, expected, dtype):
    """The same parameters, but for a change of precision."""
    tensors, expected = network.state_dict(), expected.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, expected[name].to(dtype)), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def opened(sdxl_folder):
    """The folder as diffusers opens it."""
    return StableDiffusionXLPipeline.from_pretrained(str(sdxl_folder), torch_dtype=torch.float16)


@pytest.mark.parametrize(("network", "folder"), list(zip(NETWORKS, WEIGHTS, strict=True)))
def test_diffusers_opens_the_folder_with_the_weights_of_the_model(opened, sdxl_model, network, folder):
    assert_same(getattr(opened, folder), getattr(sdxl_model, network), torch.float16)


def test_the_folder_proposes_the_scheduler_of_sdxl_base(opened):
    config = opened.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.timestep_spacing, config.steps_offset, config.prediction_type) == ("leading", 1, "epsilon")


@pytest.mark.parametrize(
    "text",
    ["", "a photo of a cat", "A Photo Of A CAT, 4k", "hello!!! ! (wow!)", "café naïve", "日本語", "👩 astronaut 🚀"],
)
def test_the_tokenizers_of_the_folder_give_our_ids(opened, text):
    fit = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert opened.tokenizer(text, **fit).input_ids == tokenize(text, PAD_L, 1).ids[0]
    assert opened.tokenizer_2(text, **fit).input_ids == tokenize(text, PAD_G, 1).ids[0]


def test_the_folder_has_the_vocabulary_files_that_older_releases_of_transformers_need(sdxl_folder):
    for tokenizer in ("tokenizer", "tokenizer_2"):
        assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(names_in(sdxl_folder / tokenizer))


def test_reading_the_folder_gives_the_model_and_its_architecture_back(sdxl_folder, sdxl_model):
    half = ModelDtypes(torch.float16, torch.float16, torch.float16, torch.float16)
    model = read_diffusers_folder(str(sdxl_folder), half)
    assert model.architecture == sdxl_model.architecture
    for network in NETWORKS:
        assert_same(getattr(model, network), getattr(sdxl_model, network), torch.float16)
        assert not any(module.training for module in getattr(model, network).modules())


def test_networks_are_read_in_the_precision_asked_for_and_else_in_float32(sdxl_folder, sdxl_model):
    model = read_diffusers_folder(str(sdxl_folder), ModelDtypes(unet=torch.bfloat16))
    assert_same(model.unet, sdxl_model.unet, torch.bfloat16)
    assert_same(model.text_encoder_g, sdxl_model.text_encoder_g, torch.float32)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_vae_is_read_out_of_a_model_folder_or_a_folder_of_its_own(sdxl_folder, sdxl_model, subfolder):
    vae = read_diffusers_vae(str(sdxl_folder / subfolder), torch.float32)
    assert_same(vae, sdxl_model.vae, torch.float32)


def test_a_folder_can_be_written_in_another_precision(tmp_path, sdxl_model):
    write_diffusers_folder(tmp_path / "model", sdxl_model, torch.bfloat16)
    for folder, file in WEIGHTS.items():
        assert {tensor.dtype for tensor in load_file(tmp_path / "model" / folder / file).values()} == {torch.bfloat16}


def test_an_existing_model_is_replaced_whole(tmp_path, sdxl_model, sdxl_folder):
    folder = tmp_path / "my set" / "last"
    shutil.copytree(sdxl_folder, folder)
    (folder / "unet" / "config.json").write_bytes(b"old")
    write_diffusers_folder(folder, sdxl_model, None)
    assert names_in(tmp_path / "my set") == ["last"]
    assert (folder / "unet" / "config.json").read_bytes() != b"old"


def test_a_file_that_somebody_put_into_an_existing_model_is_kept_beside_it(tmp_path, sdxl_model, sdxl_folder):
    folder = tmp_path / "my set" / "last"
    shutil.copytree(sdxl_folder, folder)
    (folder / "unet" / "mine.safetensors").write_bytes(b"mine")
    write_diffusers_folder(folder, sdxl_model, None)
    assert names_in(folder / "unet") == ["config.json", WEIGHTS["unet"]]
    assert (tmp_path / "my set" / "last (replaced 1)" / "unet" / "mine.safetensors").read_bytes() == b"mine"


@contextmanager
def nothing_changes_in(folder):
    """Asserts that the block leaves every file of `folder` as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_holds_no_model_is_never_replaced(tmp_path, sdxl_model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01.txt").write_text("photographic", encoding="utf-8")
    with nothing_changes_in(tmp_path), pytest.raises(UserError, match="images' exists and is "):
        write_diffusers_folder(tmp_path / "images", sdxl_model, None)


@pytest.mark.parametrize("target", ["a file", "a file/model"])
def test_a_file_in_the_way_is_an_error_and_stays(tmp_path, sdxl_model, target):
    (tmp_path / "a file").write_text("mine", encoding="utf-8")
    with nothing_changes_in(tmp_path), pytest.raises(UserError, match=f"{target}'"):
        write_diffusers_folder(tmp_path / target, sdxl_model, None)


def test_a_save_that_fills_the_disk_leaves_the_last_model_as_it_was(tmp_path, sdxl_model, sdxl_folder, full_disk):
    folder = tmp_path / "last"
    shutil.copytree(sdxl_folder, folder)
    with nothing_changes_in(tmp_path), pytest.raises(UserError, match="cannot write"), full_disk:
        write_diffusers_folder(folder, sdxl_model, None)


def without_its_folder(folder, weights):
    shutil.rmtree(weights.parent)


def with_weights_cut_short(folder, weights):
    weights.write_bytes(weights.read_bytes()[:-100])


def without_one_tensor(folder, weights):
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights, {"format": "pt"})


def with_one_tensor_misshapen(folder, weights):
    tensors = load_file(weights)
    tensors[max(tensors)] = torch.zeros(7, 7)
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "network"),
    [
        *((without_its_folder, network) for network in WEIGHTS),
        *((without_one_tensor, network) for network in WEIGHTS),
        *((with_weights_cut_short, network) for network in ("unet", "text_encoder_2")),
        *((with_one_tensor_misshapen, network) for network in ("unet", "text_encoder_2")),
    ],
)
def test_a_folder_without_a_whole_network_is_an_error_that_names_both(tmp_path, sdxl_folder, network, damage):
    folder = tmp_path / "half a model"
    shutil.copytree(sdxl_folder, folder)
    damage(folder, folder / network / WEIGHTS[network])
    with warnings.catch_warnings(), pytest.raises(UserError, match=f"half a model' is not a whole SDXL .* {network} "):
        warnings.simplefilter("ignore")  # the libraries announce what we then refuse
        read_diffusers_folder(str(folder), ModelDtypes())


def test_an_inpainting_model_is_refused(tmp_path, sdxl_folder):
    folder = tmp_path / "inpainting"
    shutil.copytree(sdxl_folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    tensors = load_file(folder / "unet" / WEIGHTS["unet"])
    tensors["conv_in.weight"] = torch.zeros(tensors["conv_in.weight"].shape[0], 9, 3, 3)
    save_file(tensors, folder / "unet" / WEIGHTS["unet"], {"format": "pt"})
    with pytest.raises(UserError, match="inpainting' is not the usual SDXL: its U-Net takes 9 channels"):
        read_diffusers_folder(str(folder), ModelDtypes())
