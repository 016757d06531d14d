"""Model files of other programs: what is read as it was meant, and what is refused by its name."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.errors import UserError
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, read_vae, write_single_file
from library.sdxl.diffusers_folder import read_diffusers_folder, read_diffusers_vae
from library.sdxl.model_source import ModelOptions, load_model
from library.sdxl.weight_names import PREFIX_L, PREFIX_VAE

pytestmark = pytest.mark.slow  # whole models are written and read for each

HALF = ModelDtypes(torch.float16, torch.float16, torch.float16, torch.float16)
NETWORKS = ["unet", "vae", "text_encoder_l", "text_encoder_g"]
PROJECTION = "conditioner.embedders.1.model.text_projection"
TO_Q = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def assert_same(network, expected):
    tensors, expected = network.state_dict(), expected.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def assert_same_model(model, expected):
    for network in NETWORKS:
        assert_same(getattr(model, network), getattr(expected, network))


@pytest.fixture
def saved(tmp_path: Path, sdxl_metadata):
    """`saved(tensors, **metadata)` is the path of a file of these, with the architecture of the tiny SDXL."""

    def save(tensors, **metadata: str) -> Path:
        path = tmp_path / "a model.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, {**sdxl_metadata, **metadata})
        return path

    return save


# -- names and forms --------------------------------------------------------------------------------------------------


def test_a_projection_under_the_name_of_a_linear_layer_is_read_as_one(saved, sdxl_tensors, sdxl_model):
    sdxl_tensors[PROJECTION + ".weight"] = sdxl_tensors.pop(PROJECTION).T
    assert_same_model(read_single_file(saved(sdxl_tensors), ModelDtypes()), sdxl_model)


def test_names_of_l_without_their_wrapper_are_read(saved, sdxl_tensors, sdxl_model):
    renamed = {name.replace(PREFIX_L, PREFIX_L.removesuffix("text_model.")): t for name, t in sdxl_tensors.items()}
    assert_same_model(read_single_file(saved(renamed), ModelDtypes()), sdxl_model)


def old_diffusers_names(tensors, vae):
    """The VAE as diffusers named it before release 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)", lambda found: found[1] + old[found[2]], name): tensor
        for name, tensor in vae.state_dict().items()
    }


def old_diffusers_names_with_convolutions(tensors, vae):
    """The same, with attention's linear layers as 1x1 convolutions."""
    return {
        name: tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in old_diffusers_names(tensors, vae).items()
    }


def new_names_in_the_old_layout(tensors, vae):
    """A converter's work that knew only the old names of attention, and passed the new ones on."""
    new = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return {
        re.sub(r"(mid\.attn_1\.)(q|k|v|proj_out)\b", lambda found: found[1] + new[found[2]], name): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX_VAE)
    }


def linear_layers_in_the_old_layout(tensors, vae):
    """Attention's 1x1 convolutions without their last two axes, as some merges store them."""
    return {
        name.removeprefix(PREFIX_VAE): tensor.flatten(1) if "attn_1" in name and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX_VAE)
    }


VAE_FORMS = [
    old_diffusers_names,
    old_diffusers_names_with_convolutions,
    new_names_in_the_old_layout,
    linear_layers_in_the_old_layout,
]


@pytest.mark.parametrize("form", VAE_FORMS)
def test_a_vae_in_older_names_and_forms_is_read(form, saved, sdxl_tensors, sdxl_model):
    path = saved(form(sdxl_tensors, sdxl_model.vae))
    assert_same(read_vae(path, None), sdxl_model.vae)


def test_a_vae_folder_in_older_names_is_read(tmp_path, sdxl_folder, sdxl_model):
    folder = tmp_path / "vae"
    shutil.copytree(sdxl_folder / "vae", folder)
    save_file(old_diffusers_names({}, sdxl_model.vae), folder / "diffusion_pytorch_model.safetensors")
    assert_same(read_diffusers_vae(str(folder), torch.float16), sdxl_model.vae)


# -- OneTrainer -------------------------------------------------------------------------------------------------------


def test_the_transposed_projection_of_onetrainer_is_announced_and_read_by_its_flag(
    tmp_path, saved, sdxl_tensors, sdxl_model, caplog
):
    path = saved({**sdxl_tensors, PROJECTION: sdxl_tensors[PROJECTION].T}, ot_branch="master")
    load_model(ModelOptions(str(path)), HALF)
    assert "written by OneTrainer, which stores G's text projection transposed" in caplog.text
    assert "--transposed_text_projection" in caplog.text

    caplog.clear()
    model = load_model(ModelOptions(str(path), transposed_text_projection=True), HALF)
    assert caplog.text == ""
    assert_same_model(model, sdxl_model)
    write_single_file(tmp_path / "saved.safetensors", model, None, {})
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[PROJECTION], sdxl_tensors[PROJECTION])


def test_a_header_of_another_program_announces_nothing(saved, sdxl_tensors, caplog):
    load_model(ModelOptions(str(saved(sdxl_tensors, other="ot_branch"))), HALF)
    assert caplog.text == ""


def test_the_flag_for_onetrainers_files_is_refused_where_it_means_nothing(sdxl_folder):
    with pytest.raises(UserError, match="is for single files"):
        load_model(ModelOptions(str(sdxl_folder), transposed_text_projection=True), HALF)
    both = ModelOptions(str(sdxl_folder), legacy_text_projection=True, transposed_text_projection=True)
    assert "exclude each other" in "".join(both.problems())


# -- a model without VAE ----------------------------------------------------------------------------------------------


@pytest.fixture
def without_vae(saved, sdxl_tensors) -> Path:
    return saved({name: tensor for name, tensor in sdxl_tensors.items() if not name.startswith(PREFIX_VAE)})


@pytest.fixture
def folder_without_vae(tmp_path, sdxl_folder) -> Path:
    shutil.copytree(sdxl_folder, tmp_path / "folder", ignore=shutil.ignore_patterns("vae"))
    return tmp_path / "folder"


@pytest.mark.parametrize("source", ["without_vae", "folder_without_vae"])
@pytest.mark.parametrize("vae", ["sdxl_file", "sdxl_folder"])
def test_a_model_without_vae_gets_the_other_one(request, source, vae, sdxl_model, caplog):
    options = ModelOptions(str(request.getfixturevalue(source)), vae=str(request.getfixturevalue(vae)))
    model = load_model(options, HALF)
    assert_same_model(model, sdxl_model)
    assert model.architecture == sdxl_model.architecture
    assert "not part of SDXL" not in caplog.text


def test_a_model_without_vae_is_refused_with_the_flag_that_gives_it_one(without_vae):
    with pytest.raises(UserError, match=r"248 tensors are missing, such as .* It holds no VAE: train with --vae"):
        load_model(ModelOptions(str(without_vae)), HALF)


def test_a_damaged_vae_does_not_matter_where_another_takes_its_place(saved, sdxl_tensors, sdxl_file, sdxl_model):
    sdxl_tensors[PREFIX_VAE + "encoder.conv_in.weight"] = torch.full((1,), torch.nan)
    model = load_model(ModelOptions(str(saved(sdxl_tensors)), vae=str(sdxl_file)), HALF)
    assert_same_model(model, sdxl_model)


# -- numbers that are none --------------------------------------------------------------------------------------------

OF_EACH_NETWORK = [
    "model.diffusion_model.input_blocks.0.0.weight",
    PREFIX_VAE + "decoder.conv_out.bias",
    PREFIX_L + "encoder.layers.11.mlp.fc2.weight",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
]


@pytest.mark.parametrize("name", OF_EACH_NETWORK)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(name, number, saved, sdxl_tensors):
    damaged = sdxl_tensors[name].clone()
    damaged.view(-1)[-1] = number
    with pytest.raises(UserError, match=f"a model.safetensors': 1 tensors hold NaN or Inf: {name}"):
        read_single_file(saved({**sdxl_tensors, name: damaged}), ModelDtypes())


def test_many_weights_that_are_not_finite_are_counted_and_ten_named(saved, sdxl_tensors):
    damaged = {
        name: torch.full_like(tensor, torch.nan) if name.startswith("model.diffusion_model.") else tensor
        for name, tensor in sdxl_tensors.items()
    }
    with pytest.raises(UserError, match=r"1680 tensors hold NaN or Inf: .* and 1670 more"):
        read_single_file(saved(damaged), ModelDtypes())


def test_a_weight_too_large_for_the_precision_of_training_is_named(saved, sdxl_tensors):
    name = OF_EACH_NETWORK[0]
    large = {**sdxl_tensors, name: sdxl_tensors[name].float() + 1e5}
    read_single_file(saved(large), ModelDtypes(unet=torch.bfloat16))
    with pytest.raises(UserError, match=f"1 tensors hold NaN or Inf: {name}.*too large for the precision"):
        read_single_file(saved(large), HALF)


def test_weights_of_a_folder_that_are_not_finite_are_named(tmp_path, sdxl_folder):
    shutil.copytree(sdxl_folder, tmp_path / "folder")
    path = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "conv_in.bias": torch.full((16,), torch.nan)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"folder/unet': 1 tensors hold NaN or Inf: conv_in\.bias"):
        read_diffusers_folder(str(tmp_path / "folder"), HALF)


# -- 8-bit floats -----------------------------------------------------------------------------------------------------


def in_8_bits(tensors, dtype, scale_of=None, suffix=".scale_weight"):
    """The matrices of the U-Net in 8-bit floats, divided by their scales, which stand beside them."""
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if not name.startswith("model.diffusion_model.") or not name.endswith(".weight") or tensor.ndim < 2:
            continue
        scale = torch.tensor(1.0) if scale_of is None else scale_of(tensor.float())
        stored[name] = (tensor.float() / scale.reshape(-1, *(1,) * (tensor.ndim - 1))).to(dtype)
        if scale_of is not None:
            stored[name.removesuffix(".weight") + suffix] = scale
    return stored


def of_the_layer(tensor):
    return tensor.abs().max() / 400


def of_each_output(tensor):
    return tensor.flatten(1).abs().amax(dim=1) / 400


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_of", [None, of_the_layer, of_each_output])
@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
def test_weights_in_8_bit_floats_are_read_with_their_scales(
    dtype, scale_of, suffix, saved, sdxl_tensors, sdxl_model, caplog
):
    stored = in_8_bits(sdxl_tensors, dtype, scale_of, suffix)
    stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=dtype)
    model = read_single_file(saved(stored), ModelDtypes(unet=torch.float32))
    expected = sdxl_model.unet.state_dict()
    for name, weight in model.unet.state_dict().items():
        # 3 or 2 bits behind the first one; numbers near zero have fewer.
        bits = 4 if dtype == torch.float8_e4m3fn else 3
        tolerance = expected[name].float().abs().max().item() / 2**8
        torch.testing.assert_close(weight, expected[name].float(), rtol=2**-bits, atol=tolerance)
    assert "weights are 8-bit floats" in caplog.text
    assert "not part of SDXL" not in caplog.text
    assert_same(model.vae, sdxl_model.vae)


def test_the_product_of_weight_and_scale_is_exact(saved, sdxl_tensors):
    stored = in_8_bits(sdxl_tensors, torch.float8_e4m3fn, of_the_layer)
    model = read_single_file(saved(stored), ModelDtypes(unet=torch.float32))
    expected = stored[TO_Q].float() * stored[TO_Q.removesuffix(".weight") + ".scale_weight"]
    weight = model.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(weight, expected)


def test_8_bit_floats_that_comfyui_notes_as_such_are_read(saved, sdxl_tensors):
    stored = in_8_bits(sdxl_tensors, torch.float8_e4m3fn, of_the_layer, ".weight_scale")
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    stored[TO_Q.removesuffix("weight") + "comfy_quant"] = note
    assert read_single_file(saved(stored), HALF).unet.dtype == torch.float16


def test_8_bit_floats_without_a_precision_asked_for_are_held_as_float32(saved, sdxl_tensors):
    model = read_single_file(saved(in_8_bits(sdxl_tensors, torch.float8_e4m3fn)), ModelDtypes())
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert model.unet.conv_in.bias.dtype == torch.float16


# -- quantised --------------------------------------------------------------------------------------------------------

LAYER = TO_Q.removesuffix(".weight")


def noted(kind: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        ({TO_Q: torch.ones(48, 48, dtype=torch.int8)}, "weights of type I8"),
        ({TO_Q: torch.ones(48, 48, dtype=torch.int8), f"{LAYER}.SCB": torch.ones(48)}, "bitsandbytes int8"),
        (
            {
                TO_Q: torch.ones(1152, 1, dtype=torch.uint8),
                f"{TO_Q}.absmax": torch.ones(36),
                f"{TO_Q}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
            },
            "bitsandbytes nf4",
        ),
        ({f"{LAYER}.qweight": torch.ones(6, 48, dtype=torch.int32)}, "GPTQ, AWQ or SVDQuant"),
        ({f"{LAYER}.comfy_quant": noted("nvfp4")}, "nvfp4"),
        ({f"{LAYER}.comfy_quant": noted("int8_tensorwise")}, "int8_tensorwise"),
        ({f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "unknown to this program"),
        (
            {TO_Q: torch.ones(48, 48).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(48, 3)},
            "blocks of 8-bit floats",
        ),
    ],
)
def test_quantised_weights_are_refused_by_their_kind(added, kind, saved, sdxl_tensors):
    with pytest.raises(UserError, match=rf"a model\.safetensors' is quantised \({kind}.*Use the model in float16"):
        read_single_file(saved({**sdxl_tensors, **added}), HALF)


def test_the_note_of_comfyui_in_the_header_is_read_too(saved, sdxl_tensors):
    path = saved(sdxl_tensors, _quantization_metadata=json.dumps({"layers": {LAYER: {"format": "nvfp4"}}}))
    with pytest.raises(UserError, match=r"is quantised \(nvfp4\)"):
        read_single_file(path, HALF)


def test_gguf_is_refused_by_its_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"model\.gguf' is quantised \(GGUF\)"):
        read_single_file(tmp_path / "model.gguf", HALF)


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        ({"conv_in.SCB": torch.ones(1)}, "bitsandbytes int8"),
        ({"conv_in.scale_weight": torch.ones(1)}, "8-bit floats"),
    ],
)
def test_a_quantised_folder_is_refused_by_its_kind(added, kind, tmp_path, sdxl_folder):
    shutil.copytree(sdxl_folder, tmp_path / "folder")
    path = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), **added}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"folder/unet' is quantised \({kind}\)"):
        read_diffusers_folder(str(tmp_path / "folder"), HALF)


def test_a_folder_without_scheduler_is_read(tmp_path, sdxl_folder, sdxl_model):
    shutil.copytree(sdxl_folder, tmp_path / "folder", ignore=shutil.ignore_patterns("scheduler"))
    assert_same_model(read_diffusers_folder(str(tmp_path / "folder"), HALF), sdxl_model)


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, logger="library")
