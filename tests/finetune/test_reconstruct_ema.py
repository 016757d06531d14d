"""The model of the moving average, and of any EMA length afterwards, against the weights of every step of a run."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import reconstruct_ema
from library.optim.ema_profiles import Decay, PowerFunction
from library.training.ema_snapshots import SnapshotRecord, write_snapshot
from tests.conftest import Run

pytestmark = pytest.mark.slow  # a run with snapshots; tests/optim has the mathematics

NUM_STEPS = 4
WIDTHS = ("0.05", "0.07", "0.1")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(train) -> Run:
    """A run that saved every step, a moving average, and snapshots of three lengths; L was frozen in between."""
    return train(
        *("--train_text_encoder", "--stop_training_te1=2", f"--max_train_steps={NUM_STEPS}", "--save_every_n_steps=1"),
        *("--ema", "--ema_decay=0.3", "--ema_snapshot_every_n_steps=1", "--ema_sigma_rel", *WIDTHS),
    )


@pytest.fixture(scope="module")
def steps(run: Run) -> list[Weights]:
    """The weights after each step."""
    return [run.weights(f"m-step{step:08d}") for step in range(1, NUM_STEPS)] + [run.weights()]


@pytest.fixture
def snapshots(run: Run, tmp_path: Path) -> Path:
    """A copy of the snapshots of the two usual lengths."""
    left_out = shutil.ignore_patterns("*0.070*")
    return Path(shutil.copytree(run.output / "m-ema-snapshots", tmp_path / "snapshots", ignore=left_out))


def averaged(steps: list[Weights], profile: Decay | PowerFunction) -> Weights:
    """What the average after the last step is by definition, in float64."""
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for step, weights in enumerate(steps[1:], start=2):
        kept = profile.kept(step - 1, step)
        average = {name: kept * average[name] + (1 - kept) * tensor.double() for name, tensor in weights.items()}
    return average


def distance(one: Weights, other: Weights) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def built(*arguments: Path | str) -> int:
    return reconstruct_ema.main([str(argument) for argument in arguments])


def test_the_saved_average_is_that_of_the_weights_of_all_steps(run: Run, steps: list[Weights]):
    expected = averaged(steps, Decay(0.3))
    saved = run.weights("m_ema")
    assert saved.keys() == steps[0].keys()
    for name, tensor in saved.items():
        assert tensor.dtype == steps[0][name].dtype
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-5, atol=1e-6)
    assert distance(saved, steps[-1]) > 1e-3
    with safe_open(run.output / "m_ema.safetensors", "pt") as file:
        assert file.metadata()["ema.decay"] == "0.3"


def test_a_length_that_was_not_kept_is_built_afterwards(run: Run, steps: list[Weights], snapshots: Path, capsys):
    exact = averaged(steps, PowerFunction(0.07))
    output = snapshots.parent / "my model.safetensors"
    assert built(snapshots, output, "--sigma_rel=0.07", "--save_precision=float") == 0
    assert "EMA of sigma_rel 0.07 after step 4, from 8 snapshots: its profile is met to" in capsys.readouterr().out
    found = load_file(output)
    assert distance(found, exact) < 5e-3 * distance(steps[-1], exact)  # rounding of float32
    kept = load_file(run.output / "m-ema-snapshots" / "m-step00000004-sigma0.070.safetensors")
    exactly = exact["model.diffusion_model.out.2.weight"].float()
    torch.testing.assert_close(kept["unet.conv_out.weight"], exactly, rtol=1e-5, atol=1e-6)
    with safe_open(output, "pt") as file:
        header = file.metadata()
    assert (header["modelspec.title"], header["modelspec.resolution"]) == ("my model", "128x128")
    assert (header["ema.sigma_rel"], header["ema.step"]) == ("0.07", "4")


def test_a_length_and_step_that_were_kept_are_built_as_they_are(steps: list[Weights], snapshots: Path):
    exact = averaged(steps[:3], PowerFunction(0.1))
    output = snapshots.parent / "x.safetensors"
    assert built(snapshots, output, "--sigma_rel=0.1", "--step=3", "--save_precision=float") == 0
    assert distance(load_file(output), exact) < 1e-3 * distance(steps[-1], exact)


@pytest.mark.slow
def test_a_diffusers_folder_holds_the_same(snapshots: Path):
    output, folder = snapshots.parent / "x.safetensors", snapshots.parent / "x"
    for each in (output, folder):
        assert built(snapshots, each, "--sigma_rel=0.1", "--save_precision=float") == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    from_folder = dict(pipeline.unet.named_parameters())["conv_out.weight"]
    assert torch.equal(from_folder, load_file(output)["model.diffusion_model.out.2.weight"])


def test_what_cannot_be_built_is_refused(snapshots: Path, capsys):
    for path in (path for step in (1, 2, 3) for path in snapshots.glob(f"*step0000000{step}*")):
        path.unlink()

    def refused(*arguments: Path | str) -> str:
        assert built(snapshots, snapshots.parent / "x.safetensors", *arguments) == 2
        assert not (snapshots.parent / "x.safetensors").exists()
        return capsys.readouterr().err

    assert "--sigma_rel is missing" in refused()
    assert "--sigma_rel is 0.5; it must be 0.28 or less" in refused("--sigma_rel=0.5")
    said = refused("--sigma_rel=0.28")
    assert "--sigma_rel is 0.28: the nearest combination of these 2 snapshots is" in said
    assert "Choose a length from 0.0" in said
    assert built(snapshots, snapshots, "--sigma_rel=0.1") == 2
    assert f"'{snapshots}' exists already and is not overwritten" in capsys.readouterr().err
    assert "--step is 9; the snapshots are of steps 4 to 4" in refused("--sigma_rel=0.1", "--step=9")
    assert "the model that was fine-tuned is not at 'gone'" in refused(
        "--sigma_rel=0.1", "--pretrained_model_name_or_path=gone"
    )

    path = snapshots / "m-step00000004-sigma0.050.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4] + b"1234")
    assert "sigma0.050.safetensors' is damaged" in refused("--sigma_rel=0.07")
    path.unlink()
    assert "sigma0.050.safetensors' is missing" in refused("--sigma_rel=0.07")


def test_snapshots_of_another_model_are_refused(tiny_sdxl: Path, tmp_path: Path, capsys):
    record = SnapshotRecord("a run", 4, 4, 0.05, str(tiny_sdxl))
    path = tmp_path / "other" / "x-step00000004-sigma0.050.safetensors"
    write_snapshot(path, record, {"unet.conv_in.weight": torch.ones(2, 2)})
    assert built(path.parent, tmp_path / "x.safetensors", "--sigma_rel=0.05") == 2
    assert "is a snapshot of another model than" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
