"""SDXL as one file: what is read is what diffusers reads, what is written is what was read."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.errors import UserError
from library.sdxl.architecture import ARCHITECTURE_KEY, DEFAULT_LOGIT_SCALE
from library.sdxl.checkpoint_file import (
    ModelDtypes,
    read_single_file,
    read_vae,
    write_single_file,
)
from library.sdxl.model_spec import HASH_KEY
from library.sdxl.weight_names import LOGIT_SCALE, PREFIX_VAE

IN_PIPELINE = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder_l": "text_encoder",
    "text_encoder_g": "text_encoder_2",
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
PROJECTION = "conditioner.embedders.1.model.text_projection"
VAE_CONV_IN = PREFIX_VAE + "encoder.conv_in.weight"


def assert_same(tensors, expected):
    """Bit for bit: names, precisions, shapes, values."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def without_wrapper(state):
    """transformers' text encoders with the names that all its releases share."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", IN_PIPELINE)
def test_every_parameter_is_the_one_that_diffusers_reads(sdxl_model, diffusers_pipeline, network):
    ours = without_wrapper(getattr(sdxl_model, network).state_dict())
    theirs = without_wrapper(getattr(diffusers_pipeline, IN_PIPELINE[network]).state_dict())
    assert_same({name: tensor.float() for name, tensor in ours.items()}, theirs)


def test_the_projection_of_the_pooled_vector_is_transposed(sdxl_model, sdxl_tensors):
    stored = sdxl_tensors[PROJECTION]
    assert not torch.equal(stored, stored.T)
    assert torch.equal(sdxl_model.text_encoder_g.text_projection.weight, stored.T)


def test_the_networks_come_ready_to_run_in_evaluation_mode(sdxl_model):
    for network in IN_PIPELINE:
        assert not any(module.training for module in getattr(sdxl_model, network).modules())
        assert not any(tensor.is_meta for tensor in getattr(sdxl_model, network).state_dict().values())


def test_each_network_is_read_in_the_precision_asked_for(sdxl_file, sdxl_model):
    dtypes = ModelDtypes(torch.bfloat16, torch.float32, None, torch.float64)
    model = read_single_file(sdxl_file, dtypes)
    for network in IN_PIPELINE:
        dtype = getattr(dtypes, network) or torch.float16
        expected = {name: tensor.to(dtype) for name, tensor in getattr(sdxl_model, network).state_dict().items()}
        assert_same(getattr(model, network).state_dict(), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_model_does_not_hang_on_its_file(tmp_path, sdxl_model, suffix):
    path = tmp_path / f"model{suffix}"
    write_single_file(path, sdxl_model, None, {})
    model = read_single_file(path, ModelDtypes())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(model.unet.state_dict(), sdxl_model.unet.state_dict())


def test_tensors_that_are_not_of_sdxl_are_named_and_left_out(tmp_path, sdxl_tensors, sdxl_metadata, capsys):
    path = tmp_path / "ema.safetensors"
    save_file({**sdxl_tensors, "model_ema.decay": torch.ones(1)}, path, sdxl_metadata)
    read_single_file(path, ModelDtypes())
    assert "1 tensors are not part of SDXL and are left out: model_ema.decay" in capsys.readouterr().err


def test_position_ids_are_left_out_without_a_word(sdxl_file, capsys):
    read_single_file(sdxl_file, ModelDtypes())
    assert capsys.readouterr().err == ""


# -- what is written --------------------------------------------------------------------------------------------------


def as_published(tensors):
    """float16 all through, as the base model."""
    return tensors


def with_float32_vae(tensors):
    """The VAE in float32, as in many merged models."""
    return {name: tensor.float() if name.startswith(PREFIX_VAE) else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("suffix", "precision"),
    [(".safetensors", as_published), (".safetensors", with_float32_vae), (".ckpt", with_float32_vae)],
)
def test_loading_and_saving_is_the_identity_bit_for_bit(tmp_path, sdxl_tensors, sdxl_metadata, suffix, precision):
    original, saved = tmp_path / "original.safetensors", tmp_path / f"saved{suffix}"
    expected = precision(sdxl_tensors)
    save_file(expected, original, sdxl_metadata)
    write_single_file(saved, read_single_file(original, ModelDtypes()), None, {})
    written = torch.load(saved, weights_only=True)["state_dict"] if suffix == ".ckpt" else load_file(saved)
    assert_same(written, expected)


def test_loading_saving_loading_gives_the_same_model(tmp_path, sdxl_model):
    for path in (tmp_path / "first.ckpt", tmp_path / "second.safetensors"):
        write_single_file(path, sdxl_model, None, {})
        again = read_single_file(path, ModelDtypes())
        assert again.architecture == sdxl_model.architecture
        assert torch.equal(again.logit_scale, sdxl_model.logit_scale)
        for network in IN_PIPELINE:
            assert_same(getattr(again, network).state_dict(), getattr(sdxl_model, network).state_dict())
        sdxl_model = again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tensor_is_saved_in_the_precision_asked_for(tmp_path, sdxl_model, sdxl_tensors, dtype):
    path = tmp_path / "model.safetensors"
    write_single_file(path, sdxl_model, dtype, {})
    assert_same(load_file(path), {name: tensor.to(dtype) for name, tensor in sdxl_tensors.items()})


def test_the_header_carries_the_metadata_and_the_unusual_architecture(tmp_path, sdxl_model):
    path = tmp_path / "model.safetensors"
    write_single_file(path, sdxl_model, None, {"modelspec.title": "猫"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop(HASH_KEY).startswith("0x")
    assert metadata == {"modelspec.title": "猫", ARCHITECTURE_KEY: sdxl_model.architecture.to_json()}


def test_a_file_without_temperature_gets_open_clips(tmp_path, sdxl_tensors, sdxl_metadata):
    path = tmp_path / "model.safetensors"
    del sdxl_tensors[LOGIT_SCALE]
    save_file(sdxl_tensors, path, sdxl_metadata)
    assert read_single_file(path, ModelDtypes()).logit_scale.item() == pytest.approx(DEFAULT_LOGIT_SCALE)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_folder_in_the_way_of_a_save_is_an_error_and_stays_as_it_was(tmp_path, sdxl_model, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=f"cannot write '.*{name}'"):
        write_single_file(tmp_path / name, sdxl_model, None, {})
    assert sorted(tmp_path.rglob("*")) == [tmp_path / name, tmp_path / name / "mine.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_save_that_fills_the_disk_leaves_the_last_model_as_it_was(tmp_path, sdxl_model, full_disk, name):
    path = tmp_path / name
    path.write_bytes(b"the model of yesterday")
    with pytest.raises(UserError, match=f"cannot write '.*{name}'"), full_disk:
        write_single_file(path, sdxl_model, None, {})
    assert path.read_bytes() == b"the model of yesterday"
    assert list(tmp_path.iterdir()) == [path]


# -- what is no SDXL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor_name", "family"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", r"Stable Diffusion 1\.x"),
        ("cond_stage_model.model.ln_final.weight", r"Stable Diffusion 2\.x"),
        ("conditioner.embedders.0.model.ln_final.weight", "the SDXL refiner"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "a LoRA, not a whole model"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA, not a whole model"),
    ],
)
def test_a_file_of_another_family_is_called_by_its_name(tmp_path, tensor_name, family):
    path = tmp_path / "other.safetensors"
    save_file({tensor_name: torch.zeros(1)}, path)
    with pytest.raises(UserError, match=rf"other\.safetensors' is not an SDXL checkpoint \(it looks like {family}\)"):
        read_single_file(path, ModelDtypes())


@pytest.mark.parametrize("missing", [CONV_IN, VAE_CONV_IN, PROJECTION])
def test_a_missing_tensor_is_named(tmp_path, sdxl_tensors, sdxl_metadata, missing):
    path = tmp_path / "incomplete.safetensors"
    del sdxl_tensors[missing]
    save_file(sdxl_tensors, path, sdxl_metadata)
    message = rf"incomplete\.safetensors' is not a whole SDXL checkpoint: 1 tensors are missing, such as {missing}\."
    with pytest.raises(UserError, match=message):
        read_single_file(path, ModelDtypes())


def test_the_nine_channels_of_an_inpainting_model_are_named(tmp_path, sdxl_tensors, sdxl_metadata):
    path = tmp_path / "inpainting.safetensors"
    channels = sdxl_tensors[CONV_IN].shape[0]
    save_file({**sdxl_tensors, CONV_IN: torch.zeros(channels, 9, 3, 3)}, path, sdxl_metadata)
    message = rf"1 tensors differ in shape: {CONV_IN} \[{channels}, 9, 3, 3\] for \[{channels}, 4, 3, 3\]"
    with pytest.raises(UserError, match=message) as error:
        read_single_file(path, ModelDtypes())
    assert "Inpainting" in error.value.remedy


@pytest.mark.parametrize(
    "note", ["{", "[]", '{"unet": {}}', '{"unet": 1, "vae": 1, "text_encoder_l": 1, "text_encoder_g": 1}']
)
def test_a_damaged_note_of_the_architecture_is_an_error_that_names_the_file(tmp_path, note):
    path = tmp_path / "tampered.safetensors"
    save_file({"weight": torch.zeros(1)}, path, {ARCHITECTURE_KEY: note})
    with pytest.raises(UserError, match=rf"tampered\.safetensors': the metadata key '{ARCHITECTURE_KEY}'"):
        read_single_file(path, ModelDtypes())


def test_a_truncated_checkpoint_is_an_error_that_names_it(tmp_path, sdxl_file):
    path = tmp_path / "half a download.safetensors"
    path.write_bytes(sdxl_file.read_bytes()[: sdxl_file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half a download\.safetensors' is not a whole safetensors file"):
        read_single_file(path, ModelDtypes())


# -- the VAE alone ----------------------------------------------------------------------------------------------------


def whole_checkpoint(tensors, vae):
    """All of SDXL."""
    return tensors


def vae_and_broken_u_net(tensors, vae):
    """A checkpoint of which only the VAE can be used."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX_VAE)} | {CONV_IN: torch.ones(1)}


def vae_file(tensors, vae):
    """A VAE in its original names, as sdxl_vae.safetensors."""
    return {name.removeprefix(PREFIX_VAE): tensor for name, tensor in tensors.items() if name.startswith(PREFIX_VAE)}


def diffusers_vae_file(tensors, vae):
    """A VAE in diffusers' names."""
    return dict(vae.state_dict())


@pytest.mark.parametrize("contents", [whole_checkpoint, vae_and_broken_u_net, vae_file, diffusers_vae_file])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_vae_is_read_alone_out_of_any_file_that_holds_it(tmp_path, sdxl_model, sdxl_tensors, contents, dtype):
    path = tmp_path / "holds a vae.safetensors"
    save_file(contents(sdxl_tensors, sdxl_model.vae), path)
    vae = read_vae(path, dtype, sdxl_model.architecture)
    expected = {name: tensor.to(dtype or torch.float16) for name, tensor in sdxl_model.vae.state_dict().items()}
    assert_same(vae.state_dict(), expected)
    assert not vae.training


def test_the_note_of_the_vaes_own_file_goes_before_the_architecture_that_is_assumed(sdxl_file, sdxl_model):
    assert_same(read_vae(sdxl_file, None).state_dict(), sdxl_model.vae.state_dict())


def test_a_vae_that_lacks_a_tensor_is_an_error_that_names_it(tmp_path, sdxl_tensors, sdxl_metadata):
    path = tmp_path / "vae.safetensors"
    tensors = vae_file(sdxl_tensors, None)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path, sdxl_metadata)
    with pytest.raises(UserError, match=r"1 tensors are missing, such as decoder\.conv_out\.bias"):
        read_vae(path, None)
