"""sdxl_train.py with masks: prepared, cached at the start or made in the step, alike; white masks change nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import sdxl_train
from finetune import prepare_buckets_latents
from tests.conftest import BUCKET_FLAGS, PHOTOGRAPHS, PreparedSet, Run, forget_accelerator

FLAGS = ("--flip_aug", "--gradient_accumulation_steps=2", "--max_train_steps=2", "--min_snr_gamma=5")


@pytest.fixture(scope="module")
def masked_set(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """The three photographs with latents of both directions and masks, whose left half is black, in `masks`."""
    made = prepared_set.without_latents(tmp_path_factory.mktemp("masked") / "my set")
    masks = save_masks(made.folder / "masks", left=0.5)
    argv = [made.images, made.captions_json, made.latents_json, tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    argv += ["--flip_aug", f"--conditioning_data_dir={masks}"]
    assert prepare_buckets_latents.main([str(argument) for argument in argv]) == 0
    return made


def save_masks(folder: Path, left: float) -> Path:
    """Masks of the photographs, white from a fraction `left` of their width on."""
    folder.mkdir(exist_ok=True)
    for name, (size, *_) in PHOTOGRAPHS.items():
        mask = Image.new("L", size)
        mask.paste(255, (int(left * size[0]), 0, *size))
        mask.save(folder / f"{name}.png")
    return folder


def of(made: PreparedSet, in_json: Path, masks: Path | None) -> tuple[str, ...]:
    given = () if masks is None else ("--masked_loss", f"--conditioning_data_dir={masks}")
    return (f"--in_json={in_json}", f"--train_data_dir={made.images}", "--enable_bucket", *given, *FLAGS)


def same_weights(run: Run, other: Run) -> bool:
    one, two = run.weights(), other.weights()
    return all(torch.equal(one[name], weight) for name, weight in two.items())


def test_prepared_masks_and_those_made_at_the_start_train_alike(train, masked_set: PreparedSet, tmp_path: Path, capsys):
    masks = masked_set.folder / "masks"
    prepared = train(*of(masked_set, masked_set.latents_json, masks))
    assert "masks: 3 from files, of 3 images; the others are trained whole" in capsys.readouterr().out
    bare = masked_set.without_latents(tmp_path / "my set")
    at_start = train(*of(bare, bare.captions_json, masks), "--cache_latents")
    assert at_start.logged("loss/current") == prepared.logged("loss/current")
    assert same_weights(at_start, prepared)


@pytest.mark.slow  # three runs
def test_white_masks_train_as_none_and_others_otherwise(train, masked_set: PreparedSet, tmp_path: Path):
    masked = train(*of(masked_set, masked_set.latents_json, masked_set.folder / "masks"))
    plain = train(*of(masked_set, masked_set.latents_json, None))
    assert masked.logged("loss/current")[0] < 0.75 * plain.logged("loss/current")[0]  # half of the cells are left
    bare = masked_set.without_latents(tmp_path / "my set")
    with_white = train(*of(bare, bare.captions_json, save_masks(tmp_path / "white", left=0)), "--cache_latents")
    assert with_white.logged("loss/current") == plain.logged("loss/current")
    assert same_weights(with_white, plain)


@pytest.mark.slow  # two runs
def test_masks_of_a_data_set_file_made_in_the_step_count_in_validation(
    tiny_sdxl: Path, masked_set: PreparedSet, tmp_path: Path
):
    shutil.copytree(masked_set.images, tmp_path / "images", ignore=shutil.ignore_patterns("*.npz"))
    text = "[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = 'images'\nvalidation_split = 0.5\n"
    found = []
    for name, left in (("half", 0.5), ("white", 0)):
        save_masks(tmp_path / name, left)
        (tmp_path / "sets.toml").write_text(f"{text}conditioning_data_dir = '{name}'\n")
        forget_accelerator()
        argv = [f"--pretrained_model_name_or_path={tiny_sdxl}", f"--dataset_config={tmp_path / 'sets.toml'}"]
        argv += ["--masked_loss", "--enable_bucket", "--resolution=128,128", *BUCKET_FLAGS, "--seed=7"]
        argv += [f"--output_dir={tmp_path / name}"]
        argv += ["--max_train_steps=1", "--validate_at_first", "--validation_timesteps=500", "--learning_rate=1e-3"]
        argv += [f"--logging_dir={tmp_path / 'logs' / name}", "--max_data_loader_n_workers=0"]
        assert sdxl_train.main(argv) == 0
        found.append(Run(argv, tmp_path / name, tmp_path / "logs" / name).logged("validation/loss"))
    half, white = found
    assert all(0.3 * whole < masked < 0.75 * whole for masked, whole in zip(half, white, strict=True))
