"""Files that are no SDXL: the trainer and the preparation say what they are, with status 2, and write nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_train
from finetune import prepare_buckets_latents
from tests.conftest import base_flags
from tests.reliability.refusal import said_on_refusal

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
VAE_CONV_IN = "first_stage_model.encoder.conv_in.weight"
FAMILIES = {
    "SD 1.5": ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "looks like Stable Diffusion 1.x"),
    "SD 2": ("cond_stage_model.model.ln_final.weight", "looks like Stable Diffusion 2.x"),
    "SDXL refiner": ("conditioner.embedders.0.model.ln_final.weight", "looks like the SDXL refiner"),
    "SD 3": ("joint_blocks.0.x_block.attn.qkv.weight", "looks like Stable Diffusion 3"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "looks like Flux"),
    "LoRA": ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "looks like a LoRA, not a whole model"),
}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with a training set of one picture."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Path("meta.json").write_text(json.dumps({"01": {"captionL": "", "captionG": ""}}), encoding="utf-8")


@pytest.fixture
def refused(in_folder, capsys):
    """`refused(model)` is what the trainer says of it."""

    def run(model: str) -> str:
        return said_on_refusal(sdxl_train, base_flags(model, "meta.json", "images", "output"), capsys)

    return run


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("tensor", "what"), FAMILIES.values(), ids=FAMILIES)
def test_the_trainer_says_of_which_family_a_model_is(tensor: str, what: str, refused):
    save_file({tensor: torch.zeros(1)}, "other.safetensors")
    assert f"'other.safetensors' is not an SDXL checkpoint (it {what})" in refused("other.safetensors")


def test_inpainting_with_nine_channels_is_named(refused, tiny_sdxl: Path):
    tensors = load_file(tiny_sdxl)
    tensors[CONV_IN] = torch.zeros(len(tensors[CONV_IN]), 9, 3, 3)
    save_file(tensors, "inpainting.safetensors", header_of(tiny_sdxl))
    said = refused("inpainting.safetensors")
    assert f"1 tensors differ in shape: {CONV_IN}" in said
    assert "Inpainting, refiner and pruned models cannot be fine-tuned here" in said


def test_a_model_that_lacks_tensors_is_named_with_them(refused, tiny_sdxl: Path):
    tensors = load_file(tiny_sdxl)
    del tensors[CONV_IN]
    save_file(tensors, "pruned.safetensors", header_of(tiny_sdxl))
    assert f"1 tensors are missing, such as {CONV_IN}." in refused("pruned.safetensors")


STRANGE = {
    "NaN": ({CONV_IN: torch.full((16, 4, 3, 3), torch.nan)}, {}, "1 tensors hold NaN or Inf: " + CONV_IN),
    "EDM, by its tensors": (
        {"edm_mean": torch.tensor([]), "edm_std": torch.tensor([])},
        {},
        "says that it predicts 'edm', which is not known here",
    ),
    "the image, by its header": (
        {},
        {"modelspec.prediction_type": "sample"},
        "says that it predicts 'sample', which is not known here",
    ),
    "int8": ({CONV_IN: torch.ones(16, 4, 3, 3, dtype=torch.int8)}, {}, "is quantised (weights of type I8)"),
    "absurd note": ({}, {"sdxl_architecture": "[" * 100_000}, "the metadata key 'sdxl_architecture'"),
}


@pytest.mark.parametrize(("added", "header", "what"), STRANGE.values(), ids=STRANGE)
def test_the_trainer_refuses_a_strange_model_in_one_line(added, header, what: str, refused, tiny_sdxl: Path):
    save_file({**load_file(tiny_sdxl), **added}, "strange.safetensors", {**header_of(tiny_sdxl), **header})
    said = refused("strange.safetensors")
    assert "'strange.safetensors'" in said
    assert what in said
    assert len(said.strip().splitlines()) == 1


def test_the_trainer_refuses_a_folder_whose_scheduler_is_not_known(refused):
    Path("model/scheduler").mkdir(parents=True)
    config = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}
    Path("model/scheduler/scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "'model' says that it predicts 'sample', which is not known here" in refused("model")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999], ids=["zero bytes", "header", "half", "last bytes"])
def test_a_model_cut_short_is_named(share: float, refused, tiny_sdxl: Path):
    whole = tiny_sdxl.read_bytes()
    Path("half.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert "'half.safetensors' is not a whole safetensors file" in refused("half.safetensors")


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_pickle_is_not_run(refused):
    torch.save({"state_dict": _Harmful()}, "model.ckpt")
    assert "'model.ckpt' is refused: it holds more than tensors and could run code" in refused("model.ckpt")
    assert not Path("harm").exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>"], ids=["zero bytes", "a page of a web site"])
def test_a_ckpt_that_is_none_is_named(content: bytes, refused):
    Path("model.ckpt").write_bytes(content)
    assert "'model.ckpt' is not a whole checkpoint" in refused("model.ckpt")


def test_a_folder_without_a_model_is_named(refused):
    Path("my model").mkdir()
    assert "'my model'" in refused("my model")


def test_a_vae_that_is_none_is_named_by_the_preparation(in_folder, tiny_sdxl: Path, capsys):
    tensors = load_file(tiny_sdxl)
    tensors[VAE_CONV_IN] = torch.zeros(1)
    save_file(tensors, "vae.safetensors", header_of(tiny_sdxl))
    argv = ["images", "meta.json", "out.json", "vae.safetensors"]
    assert f"1 tensors differ in shape: {VAE_CONV_IN}" in said_on_refusal(prepare_buckets_latents, argv, capsys)
    assert not Path("out.json").exists()
