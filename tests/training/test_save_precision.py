"""A cast that makes numbers infinite is refused, whatever the format; what was learnt is saved as a state."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_train
from library.sdxl.tensor_file import DoesNotFit, TensorToWrite, write_pickle, write_safetensors
from library.training.progress import read_progress
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator

pytestmark = pytest.mark.slow  # whole runs

LARGE = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize(("write", "suffix"), [(write_safetensors, "safetensors"), (write_pickle, "ckpt")])
@pytest.mark.parametrize(
    ("held", "saved", "num_lost"),
    [
        ([1e5, -7e4, 65504.0, 1.0], torch.float16, 2),
        ([1e5, -7e4, 65504.0, 1.0], torch.bfloat16, 0),
        ([3.4e38, 1.0], torch.bfloat16, 1),
        ([float("inf"), 1.0], torch.float16, 0),  # not by the cast
    ],
)
def test_numbers_that_a_cast_makes_infinite_are_named_and_counted(write, suffix, held, saved, num_lost, tmp_path: Path):
    tensor, path = torch.tensor(held), tmp_path / f"m.{suffix}"
    to_write = [TensorToWrite("a weight", (len(held),), saved, lambda: tensor)]
    if num_lost == 0:
        write(path, to_write, {})
        assert path.exists()
        return
    with pytest.raises(DoesNotFit, match=rf"{num_lost} of {len(held)} numbers of 'a weight' are too large for"):
        write(path, to_write, {})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def large_model(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """The tiny SDXL in float32 with numbers that float16 does not have, where they do no harm: padding of L."""
    with safe_open(tiny_sdxl, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.float() for name, tensor in load_file(tiny_sdxl).items()}
    tensors[LARGE][-1, :3] = 70000.0  # the last position is an end token, which no one attends to
    save_file(tensors, tmp_path / "large.safetensors", metadata)
    return tmp_path / "large.safetensors"


@pytest.mark.slow  # three runs
@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_a_model_that_does_not_fit_its_precision_is_refused_and_the_state_saved(
    form: str, large_model: Path, prepared_set: PreparedSet, tmp_path: Path, capsys
):
    argv = [
        *base_flags(large_model, prepared_set.latents_json, prepared_set.images, tmp_path / "output"),
        *("--output_name=m", "--max_train_steps=2", "--max_data_loader_n_workers=0", f"--save_model_as={form}"),
        *("--save_every_n_steps=1", "--seed=7", *BUCKET_FLAGS),
    ]
    forget_accelerator()
    assert sdxl_train.main([*argv, "--save_precision=fp16"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "'m-step00000001' is not saved. Training continues" in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"is not written: 3 of \d+ numbers of '.*position_embedding.weight' are too large for float16", line
    )
    assert "Save with --save_precision=bf16 or --save_precision=float." in line
    assert 'All that was learnt in 2 steps is saved; continue with --resume "' in line
    assert not list((tmp_path / "output").glob("*.safetensors"))
    [state] = (tmp_path / "output").glob("*-state")
    assert read_progress(state).step == 2
    forget_accelerator()
    assert sdxl_train.main([*argv, "--save_precision=bf16", f"--resume={state}"]) == 0
