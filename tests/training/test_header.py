"""The header of a trained model, checked against the specification and read by public readers."""

import base64
import hashlib
import io
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from huggingface_hub import parse_local_safetensors_file_metadata
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.sdxl.architecture import ARCHITECTURE_KEY
from library.training.header import LONGEST_TAG
from tests.conftest import RATE, PreparedSet, Run

# ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec): what its tables ask of an image model.
MUST = {"sai_model_spec", "architecture", "implementation", "title"}
SHOULD = {"description", "author", "date", "hash_sha256", "resolution"}
CAN = {
    *("implementation_version", "license", "usage_hint", "thumbnail", "tags", "merged_from", "trigger_phrase"),
    *("prediction_type", "timestep_range", "encoder_layer", "preprocessor", "is_negative_embedding"),
    *("unet_dtype", "vae_dtype"),
}
FORMS = {
    "sai_model_spec": r"1\.0\.1",
    "architecture": r"stable-diffusion-xl-v1-base",
    "implementation": r"\S+",
    "resolution": r"\d+x\d+",
    "hash_sha256": r"0x[0-9a-f]{64}",
    "thumbnail": r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*",
    "timestep_range": r"\d+,\d+",
    "prediction_type": r"epsilon|v",
}


@pytest.fixture(scope="module")
def source(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with a header that names its author and license."""
    path = tmp_path_factory.mktemp("source") / "the base.safetensors"
    with safe_open(tiny_sdxl, framework="pt") as file:
        metadata = file.metadata()
    notes = {"modelspec.author": "Base Corp", "modelspec.license": "Base License", "modelspec.title": "Base"}
    save_file(load_file(tiny_sdxl), path, {**metadata, **notes})
    return path


HALF = "half \ud83d of a pair"
"""A caption that JSON can hold and UTF-8 cannot."""


@pytest.fixture(scope="module")
def trained(train, source: Path, prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with samples before and after its first step, flags that the header names, and captions of odd kinds."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    metadata = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    metadata["coffee"] |= {"captionL": HALF, "captionG": "x" * 2 * LONGEST_TAG}
    in_json = prompts.with_name("meta_lat.json")
    in_json.write_text(json.dumps(metadata), encoding="utf-8")
    prompts.write_text("a cat --e photo --w 64 --h 64 --s 1\na dog --e photo --w 64 --h 64 --s 1\n", encoding="utf-8")
    return train(
        *(f"--pretrained_model_name_or_path={source}", f"--sample_prompts={prompts}", "--sample_every_n_steps=1"),
        f"--in_json={in_json}",
        *("--max_train_steps=2", "--min_timestep=500", "--metadata_trigger_phrase=xyz", "--metadata_usage_hint=hint"),
        *("--train_text_encoder", "--learning_rate_te1=0.5", "--learning_rate_te2=0"),
        *("--caption_dropout_rate_l=0.25", "--caption_prefix_g=my", "--min_snr_gamma=5", "--loss_type=smooth_l1"),
        *("--huber_schedule=constant", "--huber_c=0.2", "--ip_noise_gamma=0.1", "--debiased_estimation_loss"),
        *("--zero_terminal_snr", "--noise_offset=0.05", "--noise_offset_random_strength"),
    )


@pytest.fixture(scope="module")
def header(trained: Run) -> dict[str, str]:
    with safe_open(trained.output / "m.safetensors", framework="pt") as file:
        return dict(file.metadata())


def test_required_and_recommended_keys_are_there_in_the_form_of_the_specification(header):
    spec = {key.removeprefix("modelspec."): value for key, value in header.items() if key.startswith("modelspec.")}
    assert spec.keys() >= MUST | SHOULD
    assert spec.keys() <= MUST | SHOULD | CAN
    assert [(key, spec[key]) for key, form in FORMS.items() if not re.fullmatch(form, spec[key])] == []
    assert datetime.fromisoformat(spec["date"]).utcoffset() is not None
    assert (spec["title"], spec["author"], spec["license"]) == ("m", "Base Corp", "Base License")
    assert (spec["trigger_phrase"], spec["usage_hint"], spec["timestep_range"]) == ("xyz", "hint", "500,999")
    assert "the base.safetensors" in spec["description"]


def test_the_hash_is_that_of_the_bytes_behind_the_header(trained: Run, header):
    content = (trained.output / "m.safetensors").read_bytes()
    weights = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(weights).hexdigest()}"


def test_both_public_readers_read_the_header_and_the_tensors(trained: Run, header):
    read = parse_local_safetensors_file_metadata(trained.output / "m.safetensors")
    assert read.metadata == header
    assert read.tensors.keys() == trained.weights().keys()


def test_the_thumbnail_is_the_newest_sample_of_the_first_prompt(trained: Run, header):
    """The model is saved before the samples of its own step are drawn: those of step 1 are the newest."""
    [path] = (trained.output / "sample").glob("m_*_000001_00.png")
    text = header["modelspec.thumbnail"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(text))) as small, Image.open(path) as sample:
        expected = sample.resize(small.size, Image.Resampling.BICUBIC)
        differences = [abs(a - b) for a, b in zip(small.tobytes(), expected.tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 12  # of 255: what JPEG costs an image of noise


def test_how_it_was_trained_stands_in_keys_that_model_managers_show(header):
    said = {key: header.get(key) for key in header if key.startswith("ss_")}
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": "the base.safetensors",
        "ss_output_name": "m",
        "ss_steps": "2",
        "ss_max_train_steps": "2",
        "ss_num_train_images": "3",
        "ss_resolution": "(128, 128)",
        "ss_optimizer": "torch.optim.SGD",
        "ss_seed": "7",
        "ss_unet_lr": str(RATE),
        "ss_text_encoder_lr": "[0.5, 0.0]",
        "ss_learning_rate_te1": "0.5",
        "ss_learning_rate_te2": "0.0",
        "ss_one_caption": "False",
        "ss_captions_l": "meta_lat.json",
        "ss_captions_g": "meta_lat.json",
        "ss_caption_dropout_rate": "0.0",
        "ss_caption_dropout_rate_l": "0.25",
        "ss_caption_dropout_rate_g": "0.0",
        "ss_caption_prefix_g": "my",
        "ss_min_snr_gamma": "5.0",
        "ss_loss_type": "smooth_l1",
        "ss_huber_schedule": "constant",
        "ss_huber_c": "0.2",
        "ss_huber_scale": "1.0",
        "ss_ip_noise_gamma": "0.1",
        "ss_ip_noise_gamma_random_strength": "False",
        "ss_noise_offset": "0.05",
        "ss_noise_offset_random_strength": "True",
        "ss_debiased_estimation": "True",
        "ss_scale_v_pred_loss_like_noise_pred": "False",
        "ss_zero_terminal_snr": "True",
        "ss_v_parameterization": "False",
        "ss_masked_loss": "False",
    }
    assert {key: said.get(key) for key in expected} == expected
    tags = json.loads(said["ss_tag_frequency"])
    assert tags["L"]["official portrait"] == 1
    assert tags["G"]["my a woman in a space suit"] == 1
    assert not any("/" in value for key, value in said.items() if key != "ss_tag_frequency")  # no folder of the machine
    assert ARCHITECTURE_KEY in header


def test_captions_that_utf8_cannot_hold_and_captions_of_any_length_leave_a_header_that_can_be_read(header):
    tags = json.loads(header["ss_tag_frequency"])
    assert tags["L"][HALF.replace("\ud83d", "?")] == 1
    assert tags["G"][f"my {'x' * LONGEST_TAG}"[:LONGEST_TAG]] == 1
