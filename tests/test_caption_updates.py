"""A caption file that was edited: named at the start of a run, and trained with --update_captions, on the tiny SDXL."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import sdxl_train
from tests.conftest import PreparedSet, Run, forget_accelerator

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def copied(prepared_set: PreparedSet, tmp_path: Path) -> PreparedSet:
    """The prepared set in a folder that may be written to."""
    shutil.copytree(prepared_set.folder, tmp_path / "my set")
    return PreparedSet(tmp_path / "my set")


def flags_of(prepared: PreparedSet) -> list[str]:
    return [f"--in_json={prepared.latents_json}", f"--train_data_dir={prepared.images}"]


def with_caption(prepared: PreparedSet, path: Path, caption_l: str) -> str:
    """The flag of a copy of the metadata with another L caption of one image, which is from no file."""
    entries = json.loads(prepared.latents_json.read_text(encoding="utf-8"))
    entries["chelsea"]["captionL"] = caption_l
    del entries["chelsea"]["captionL_source"]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return f"--in_json={path}"


def assert_equal(run: Run, other: Run) -> None:
    """Same weights, bit for bit."""
    one, two = run.weights(), other.weights()
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


@pytest.mark.slow  # five runs
def test_an_edited_caption_is_named_and_trained_on_request(train, copied: PreparedSet, tmp_path: Path, capsys):
    edited = copied.images / "chelsea.txt"
    edited.write_text("a drawing", encoding="utf-8")
    old = train(*flags_of(copied))
    assert f"1 caption files have changed since they were merged into '{copied.latents_json}'" in (
        said := capsys.readouterr().err
    )
    assert f"'{edited}'" in said
    assert_equal(old, train())
    new = train(*flags_of(copied), "--update_captions")
    assert f"1 changed files are taken over into '{copied.latents_json}': '{edited}'" in capsys.readouterr().out
    assert_equal(new, train(with_caption(copied, tmp_path / "meta.json", "a drawing")))
    again = train(*flags_of(copied), "--cache_text_encoder_outputs")
    assert "caption files have changed" not in capsys.readouterr().err
    assert_equal(again, new)


@pytest.mark.slow
def test_a_new_image_is_added_with_the_bucket_of_the_rule(train, copied: PreparedSet, unet_inputs):
    Image.new("RGB", (70, 260)).save(copied.images / "new.png")
    for suffix in (".txt", ".caption"):
        (copied.images / f"new{suffix}").write_text("a grey area", encoding="utf-8")
    train(*flags_of(copied), "--update_captions", "--enable_bucket", "--max_train_steps=4", "--cache_latents_to_disk")
    assert [4, 32, 8] in [list(call["sample"].shape[1:]) for call in unet_inputs]
    assert (copied.images / "new.npz").is_file()


@pytest.mark.slow
def test_a_resumed_run_accepts_what_it_was_told_to_update(train, copied: PreparedSet, capsys):
    run = train(*flags_of(copied), "--max_train_steps=2", "--save_state")
    (copied.images / "chelsea.txt").write_text("a drawing", encoding="utf-8")
    resumed = [*run.argv, "--max_train_steps=4", "--resume=latest"]
    capsys.readouterr()
    forget_accelerator()
    assert sdxl_train.main([*resumed, "--update_captions"]) == 0
    assert "1 images with another image, bucket, caption or kind of latents: chelsea" in capsys.readouterr().out


def test_one_caption_has_no_files_to_update_from(train, copied: PreparedSet, capsys):
    flags = [*flags_of(copied), "--output_dir=x", "--pretrained_model_name_or_path=y"]
    assert sdxl_train.main([*flags, "--update_captions", "--one_caption"]) == 2
    assert "--update_captions reads a caption file for each encoder" in capsys.readouterr().err
