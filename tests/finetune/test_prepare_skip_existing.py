"""`--skip_existing`: which latents are kept, which are made again, and that the reason is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def prepared(folder):
    """A folder with two prepared pictures, of which tests change the first."""
    for name in "ab":
        folder.add(f"{name}.png")
    folder.prepare_all()
    return folder


def written_anew(folder, *flags, **options):
    """Which caches another run with --skip_existing writes."""
    before = {path: path.stat().st_mtime_ns for path in folder.images.glob("*.npz")}
    assert folder.prepare("--skip_existing", *flags, **options) == 0
    assert None not in folder.resolutions().values()
    return [path.stem for path in sorted(before) if path.stat().st_mtime_ns != before[path]]


def without_our_keys(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in ("latents", "original_size", "crop_ltrb")}
    np.savez(path, **arrays)


def test_caches_that_fit_are_kept_and_counted(prepared, capsys):
    prepared.out_json.unlink()
    assert written_anew(prepared) == []
    assert prepared.resolutions() == {"a": [64, 64], "b": [64, 64]}
    assert "2 images (2 had their latents)" in capsys.readouterr().out


def test_without_the_flag_everything_is_encoded_again(prepared):
    (prepared.images / "a.npz").write_bytes(b"")
    assert prepared.prepare() == 0
    assert prepared.cached("a").bucket == (64, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: Image.new("RGB", (100, 60)).save(path.with_suffix(".png")), "the image has changed"),
        (without_our_keys, "it does not say what it was made from"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "is not a usable latent cache"),
    ],
    ids=["picture", "foreign", "damaged"],
)
def test_a_cache_that_no_longer_fits_its_picture_is_named_and_made_again(prepared, capsys, change, reason):
    path = prepared.images / "a.npz"
    change(path)
    assert written_anew(prepared) == ["a"]
    printed = capsys.readouterr().err
    assert f"'{path}'" in printed
    assert reason in printed
    assert "It is encoded again." in printed
    assert written_anew(prepared) == []


@pytest.mark.parametrize("flag", ["--flip_aug", "--alpha_mask", "--legacy_crop_coords", "--max_resolution=96,64"])
def test_flags_that_change_the_caches_have_them_made_again(prepared, flag):
    assert written_anew(prepared, flag) == ["a", "b"]
    assert written_anew(prepared, flag) == []


def test_another_vae_has_the_caches_made_again_and_another_precision_does_not(prepared, write_vae):
    def change(tensors):
        tensors["first_stage_model.quant_conv.bias"] += 0.5

    other = write_vae("other", change)
    assert written_anew(prepared, "--mixed_precision=bf16") == []
    assert written_anew(prepared, model=other) == ["a", "b"]


def test_the_fingerprint_of_a_float32_vae_is_the_same_in_every_precision(prepared, write_vae):
    def change(tensors):
        generator = torch.Generator().manual_seed(0)
        for tensor in tensors.values():  # values that neither float16 nor bfloat16 can hold
            tensor += torch.rand(tensor.shape, generator=generator) * 1e-4

    float32 = write_vae("float32", change)
    assert written_anew(prepared, model=float32) == ["a", "b"]
    for precision in ("fp16", "bf16", "no"):
        assert written_anew(prepared, f"--mixed_precision={precision}", model=float32) == []


def test_what_was_edited_in_an_earlier_output_is_named(prepared, capsys):
    assert prepared.prepare() == 0
    assert "were edited" not in "".join(capsys.readouterr())
    metadata = json.loads(prepared.out_json.read_text(encoding="utf-8"))
    metadata["a"] |= {"loss_weight": 2.0, "captionL": "mine"}
    metadata["gone"] = {"captionL": "kept?", "captionG": ""}
    prepared.out_json.write_text(json.dumps(metadata), encoding="utf-8")
    assert prepared.prepare("--skip_existing") == 0
    said = "".join(capsys.readouterr())
    assert "2 entries were edited in" in said
    assert "'a' (captionL, loss_weight), 'gone' (captionG, captionL)" in said
    prepared.out_json.write_text("{", encoding="utf-8")
    assert prepared.prepare("--skip_existing") == 0
    assert "an earlier output that cannot be read is replaced" in "".join(capsys.readouterr())
