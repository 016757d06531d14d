"""Where a model comes from: files, folders, names of the hub, and names of nothing. (No test asks the hub.)"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.errors import UserError
from library.sdxl import diffusers_folder
from library.sdxl.architecture import SDXL_BASE
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.sdxl.model_source import ModelOptions, architecture_of, load_model, load_unet, load_vae
from library.sdxl.weight_names import PREFIX_VAE

HALF = ModelDtypes(torch.float16, torch.float16, torch.float16, torch.float16)
NETWORKS = ["unet", "vae", "text_encoder_l", "text_encoder_g"]


def assert_same(network, expected):
    tensors, expected = network.state_dict(), expected.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def other_vae_model(sdxl_model, tmp_path_factory):
    """`sdxl_model` with another VAE: other weights, and a note that it runs in float16."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    architecture = dataclasses.replace(
        sdxl_model.architecture, vae={**sdxl_model.architecture.vae, "force_upcast": False}
    )
    write_single_file(path, dataclasses.replace(sdxl_model, architecture=architecture), None, {})
    model = read_single_file(path, ModelDtypes())
    model.vae.decoder.conv_out.bias.data += 1
    return model


@pytest.mark.parametrize("source", ["sdxl_file", "sdxl_folder"])
def test_a_model_is_loaded_from_a_file_or_a_folder(request, sdxl_model, source):
    model = load_model(ModelOptions(str(request.getfixturevalue(source))), HALF)
    for network in NETWORKS:
        assert_same(getattr(model, network), getattr(sdxl_model, network))


@pytest.mark.parametrize("kind", ["checkpoint", "original names", "folder"])
def test_another_vae_takes_the_place_of_the_models_own_and_is_saved_with_it(
    tmp_path, sdxl_file, sdxl_model, other_vae_model, kind
):
    vae = tmp_path / "my vae.safetensors"
    write_single_file(vae, other_vae_model, None, {})
    if kind == "original names":
        prefix = len(PREFIX_VAE)
        save_file({n[prefix:]: t for n, t in load_file(vae).items() if n.startswith(PREFIX_VAE)}, vae)
    if kind == "folder":
        vae = tmp_path / "my vae"
        write_diffusers_folder(vae, other_vae_model, None)

    model = load_model(ModelOptions(str(sdxl_file), vae=str(vae)), HALF)
    assert_same(model.vae, other_vae_model.vae)
    assert_same(model.unet, sdxl_model.unet)
    # A bare VAE file carries no configuration: it is taken for a VAE like the model's own.
    assert model.architecture == (sdxl_model if kind == "original names" else other_vae_model).architecture

    write_single_file(tmp_path / "saved.safetensors", model, None, {})
    saved = read_single_file(tmp_path / "saved.safetensors", ModelDtypes())
    assert_same(saved.vae, other_vae_model.vae)
    assert saved.vae.config.force_upcast == model.architecture.vae["force_upcast"]


def test_the_vae_alone_is_loaded_from_a_folder_in_evaluation_mode(sdxl_folder, sdxl_model):
    vae = load_vae(str(sdxl_folder / "vae"), torch.float16)
    assert_same(vae, sdxl_model.vae)
    assert not vae.training


def test_a_vae_file_without_a_note_is_taken_for_that_of_sdxl_base(tmp_path, sdxl_tensors):
    path = tmp_path / "tiny vae.safetensors"
    save_file(sdxl_tensors, path)
    width = SDXL_BASE.vae["block_out_channels"][0]
    with pytest.raises(UserError, match=rf"tiny vae\.safetensors' is not the usual SDXL: .* for \[{width}, 3, 3, 3\]"):
        load_vae(str(path), None)


def test_legacy_text_projection_is_announced_and_leaves_the_weights_alone(sdxl_file, sdxl_model, capsys):
    model = load_model(ModelOptions(str(sdxl_file), legacy_text_projection=True), HALF)
    assert "transposed matrix" in capsys.readouterr().err
    assert_same(model.text_encoder_g, sdxl_model.text_encoder_g)


# -- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    [
        "my set/sd_xl_base_1.0.safetensors",
        "models/sd_xl_base_1.0.safetensors",
        "models/model.ckpt",
        "sd_xl_base_1.0.safetensors",
        "sdxl",
        "./models/sdxl",
        "/models/sdxl",
        "C:\\models\\sdxl",
        "C:/sdxl",
        "my set/sdxl",
        "a/b/c",
    ],
)
def test_a_path_that_does_not_exist_is_said_before_anything_loads(monkeypatch, tmp_path, missing):
    monkeypatch.chdir(tmp_path)
    options = ModelOptions(missing, vae=missing)
    assert list(options.problems()) == [
        f"--pretrained_model_name_or_path: there is no '{missing}'.",
        f"--vae: there is no '{missing}'.",
    ]
    with pytest.raises(UserError, match="there is no file"):
        load_model(options, HALF)


@pytest.mark.parametrize(
    "name",
    ["stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix", "RunDiffusion/Juggernaut_XL.v9"],
)
def test_a_name_of_the_hub_is_no_missing_file(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert list(ModelOptions(name, vae=name).problems()) == []


def test_existing_files_and_folders_are_no_problem(monkeypatch, tmp_path, sdxl_folder, sdxl_file):
    monkeypatch.chdir(tmp_path)
    shutil.copy(sdxl_file, "named without a suffix")
    for source in ("named without a suffix", str(sdxl_file), str(sdxl_folder)):
        assert list(ModelOptions(source, vae=source).problems()) == []


def test_no_model_at_all_is_a_problem():
    assert list(ModelOptions().problems()) == [
        "--pretrained_model_name_or_path is missing: name the SDXL checkpoint to start from."
    ]
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is missing"):
        load_model(ModelOptions(), HALF)


@pytest.mark.parametrize("source", ["sdxl_file", "sdxl_folder"])
def test_the_sizes_of_a_model_are_read_without_its_weights(source, sdxl_model, request):
    found = architecture_of(ModelOptions(str(request.getfixturevalue(source))))
    for network in ("unet", "text_encoder_l", "text_encoder_g"):
        assert getattr(found, network) == getattr(sdxl_model.architecture, network)


@pytest.mark.parametrize("source", ["sdxl_file", "sdxl_folder"])
def test_a_unet_that_is_read_later_is_the_same_and_stays_as_it_was_set_up(source, request):
    options = ModelOptions(str(request.getfixturevalue(source)))
    expected = load_model(options, HALF)
    model = load_model(options, HALF, with_unet=False)
    assert all(weight.is_meta for weight in model.unet.parameters())
    assert model.architecture == expected.architecture
    model.unet.requires_grad_(False).train()
    load_unet(options, model.unet, torch.float16, torch.device("cpu"))
    for name in NETWORKS:
        assert_same(getattr(model, name), getattr(expected, name))
    assert model.unet.training
    assert not any(weight.requires_grad for weight in model.unet.parameters())


def in_parts(folder: Path, into: Path) -> Path:
    """A copy of a diffusers folder whose U-Net stands in two files and an index, as large ones do."""
    shutil.copytree(folder, into)
    whole = into / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for part in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == part}, into / "unet" / part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return into


@pytest.mark.parametrize("form", ["whole", "in parts"])
def test_a_unet_of_a_folder_never_stands_whole_in_host_memory(form, sdxl_folder, tmp_path, monkeypatch):
    folder = sdxl_folder if form == "whole" else in_parts(sdxl_folder, tmp_path / "parts")
    options = ModelOptions(str(folder))
    expected = load_model(options, HALF)
    model = load_model(options, HALF, with_unet=False)
    monkeypatch.setattr(diffusers_folder, "_load", None)  # which would read all of it at once
    load_unet(options, model.unet, torch.float16, torch.device("cpu"))
    assert_same(model.unet, expected.unet)


def test_a_unet_of_a_folder_with_nan_is_refused_when_it_is_read(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "folder")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], float("nan"))
    save_file(tensors, path)
    options = ModelOptions(str(folder))
    model = load_model(options, HALF, with_unet=False)
    with pytest.raises(UserError, match=r"1 tensors hold NaN or Inf: conv_out.bias"):
        load_unet(options, model.unet, torch.float16, torch.device("cpu"))


def test_a_unet_with_nan_is_refused_when_it_is_read(sdxl_file, tmp_path):
    tensors = load_file(sdxl_file)
    name = "model.diffusion_model.out.2.bias"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    with safe_open(sdxl_file, framework="pt") as file:
        save_file(tensors, tmp_path / "damaged.safetensors", file.metadata())
    options = ModelOptions(str(tmp_path / "damaged.safetensors"))
    model = load_model(options, HALF, with_unet=False)
    with pytest.raises(UserError, match=rf"1 tensors hold NaN or Inf: {name}"):
        load_unet(options, model.unet, torch.float16, torch.device("cpu"))
