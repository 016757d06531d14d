"""Losses that are no numbers, spikes, full GPUs, broken weights: what is reported, and what survives."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_train
from library.config.errors import UserError
from library.config.magnitudes import HIGHEST_RATE
from library.training.loss_watch import LossWatch, StepLoss, require_finite
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator

OVERFLOWING = (f"--learning_rate={HIGHEST_RATE}", "--max_grad_norm=0", "--optimizer_args", "weight_decay=1e38")


@pytest.fixture
def train_in(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path):
    """`train_in(images, *flags)` returns the exit status of a run into tmp_path/output."""

    def run(images: Path, *flags: str, model: Path = tiny_sdxl) -> int:
        forget_accelerator()
        return sdxl_train.main(
            [
                *base_flags(model, prepared_set.latents_json, images, tmp_path / "output"),
                *("--output_name=m", "--seed=7", "--max_train_steps=3", "--max_data_loader_n_workers=0"),
                *("--optimizer_type=torch.optim.SGD", "--learning_rate=1e-3", *BUCKET_FLAGS, *flags),
            ]
        )

    return run


@pytest.fixture
def bad_set(prepared_set: PreparedSet, tmp_path: Path) -> Path:
    """The prepared pictures, the latents of one so large that the U-Net's numbers overflow."""
    images = tmp_path / "bad set"
    shutil.copytree(prepared_set.images, images)
    with np.load(images / "coffee.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(images / "coffee.npz", **(arrays | {"latents": arrays["latents"] * np.float32(1e30)}))
    return images


def test_a_loss_that_is_no_number_names_its_images_and_keeps_what_was_saved(train_in, bad_set, tmp_path, capsys):
    assert train_in(bad_set, "--save_every_n_steps=1", "--gradient_accumulation_steps=1") == 2
    said = capsys.readouterr().err
    assert "the loss is nan, with the images coffee. Training stopped" in said
    saved = list((tmp_path / "output").glob("*.safetensors"))
    assert "m.safetensors" not in [path.name for path in saved]
    assert all(weight.isfinite().all() for path in saved for weight in load_file(path).values())


def test_a_bad_step_may_pass_and_leaves_the_weights_alone(train_in, bad_set, tmp_path, capsys):
    assert train_in(bad_set, "--max_bad_steps=2") == 0
    assert "with the images coffee; the weights are not updated" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "output" / "m.safetensors").values())


def test_broken_weights_never_take_the_place_of_good_ones(train_in, prepared_set, tmp_path, capsys):
    assert train_in(prepared_set.images, "--max_train_steps=1") == 0
    good = (tmp_path / "output" / "m.safetensors").read_bytes()
    assert train_in(prepared_set.images, "--max_train_steps=1", *OVERFLOWING) == 2
    assert "the weights of unet have become NaN or Inf" in capsys.readouterr().err
    assert (tmp_path / "output" / "m.safetensors").read_bytes() == good


def test_a_picture_that_is_no_numbers_is_said_and_not_saved(train_in, prepared_set, tiny_sdxl, tmp_path, capsys):
    with safe_open(tiny_sdxl, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tiny_sdxl)
    # A model whose numbers are not finite is refused when it is loaded; these overflow in the sum of a convolution.
    name = "first_stage_model.decoder.conv_out.weight"
    tensors[name] = torch.full(tensors[name].shape, 3e38)
    save_file(tensors, tmp_path / "bad vae.safetensors", metadata)
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a cat --e photo --w 64 --h 64 --s 1", encoding="utf-8")
    flags = (f"--sample_prompts={prompts}", "--sample_at_first", "--max_train_steps=1")
    assert train_in(prepared_set.images, *flags, model=tmp_path / "bad vae.safetensors") == 0
    assert "step 0: the image of prompt 1 is NaN and is not saved" in capsys.readouterr().err
    assert not list((tmp_path / "output").glob("sample/*.png"))


def test_a_full_gpu_is_explained_with_step_size_and_flags(train_in, prepared_set, monkeypatch, capsys):
    def overflow(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(UNet2DConditionModel, "forward", overflow)
    assert train_in(prepared_set.images) == 2
    said = capsys.readouterr().err
    assert "the GPU is out of memory in step 1, with 1 images of " in said
    assert "--gradient_checkpointing" in said
    assert "Traceback" not in said


def test_the_images_of_the_bad_batch_alone_are_named(fresh_accelerate):
    loss = StepLoss(Accelerator(cpu=True))
    loss.add(("a", "b"), torch.tensor(1.0), is_last=False)
    loss.add(("c",), torch.tensor(math.inf), is_last=True)
    assert math.isinf(loss.mean())
    assert loss.bad_images() == ["c"]
    loss.clear()
    loss.add(("d",), torch.tensor(2.0), is_last=True)
    assert (loss.mean(), loss.bad_images()) == (2.0, [])


def test_only_bad_steps_in_a_row_end_the_run(caplog):
    watch = LossWatch(2)
    assert [watch.accepts(step, loss, list) for step, loss in enumerate((math.nan, 1.0, math.inf))] == [
        False,
        True,
        False,
    ]
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        watch.accepts(3, math.nan, list)
    assert len(caplog.records) == 2


def test_a_gradient_that_jumps_is_reported(caplog):
    watch = LossWatch(1)
    for step, norm in enumerate((1.0, 1.2, 0.9, 50.0, 1.0, math.inf, None)):
        watch.check_gradient(step, norm)
    assert [line.partition(":")[0] for line in caplog.messages] == ["step 3", "step 5"]


def test_weights_that_are_numbers_may_be_saved():
    layer = torch.nn.Linear(2, 2)
    require_finite({"unet": layer})
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"unet have become NaN or Inf \(weight\)"):
        require_finite({"unet": layer})
