"""sdxl_train.py on images that vary: drawn for each visit, told to the model, refused where latents are cached."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sdxl_train
from finetune import prepare_buckets_latents
from library.training import preparation
from tests.conftest import BUCKET_FLAGS, PHOTOGRAPHS, PreparedSet, Run, base_flags, forget_accelerator, merge_captions

pytestmark = pytest.mark.slow  # a run for each; tests/data has the same draws without training

FACE = {"astronaut": "astronaut_64_30_40_40"}
ALL = (
    *("--color_aug", "--random_crop", "--face_crop_aug_range=1.2,2.0", "--flip_aug", "--resize_interpolation=cubic"),
    *("--enable_bucket", "--dataset_repeats=2"),
)


@pytest.fixture(scope="module")
def named_set(prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """The three photographs, one of them named for its face, with captions merged."""
    made = PreparedSet(tmp_path_factory.mktemp("named") / "my set")
    made.images.mkdir(parents=True)
    for name in PHOTOGRAPHS:
        for suffix in (".jpg", ".txt", ".caption"):
            shutil.copy(prepared_set.images / f"{name}{suffix}", made.images / f"{FACE.get(name, name)}{suffix}")
    merge_captions(made)
    return made


def of(prepared: PreparedSet) -> tuple[str, str]:
    return f"--in_json={prepared.captions_json}", f"--train_data_dir={prepared.images}"


def assert_same_weights(run: Run, other: Run) -> None:
    assert run.logged("loss/current") == other.logged("loss/current")[-len(run.logged("loss/current")) :]
    one, two = run.weights(), other.weights()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pixels of each image that the VAE encodes in a step."""
    images: list[torch.Tensor] = []
    encode = preparation.encode_pixels_finite

    def recording(vae, pixels):
        images.extend(pixels.clone())
        return encode(vae, pixels)

    monkeypatch.setattr(preparation, "encode_pixels_finite", recording)
    return images


# -- the same pixels, another way -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(train, named_set: PreparedSet) -> Run:
    """An epoch and a half of everything that varies, with a state in the middle of each epoch."""
    return train(*of(named_set), *ALL, "--max_train_steps=9", "--save_every_n_steps=4", "--save_state")


def test_workers_change_nothing(train, named_set: PreparedSet, whole_run: Run):
    with_workers = train(*of(named_set), *ALL, "--max_train_steps=9", "--max_data_loader_n_workers=2")
    assert_same_weights(with_workers, whole_run)


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_in_an_epoch_goes_on_as_it_would_have(train, named_set, whole_run: Run, step: int):
    state = whole_run.output / f"m-step{step:08d}-state"
    resumed = train(*of(named_set), *ALL, "--max_train_steps=9", f"--resume={state}", "--max_data_loader_n_workers=2")
    assert_same_weights(resumed, whole_run)


def test_the_pixels_of_a_visit_are_the_same_in_any_batch(train, named_set: PreparedSet, encoded):
    def images_of_an_epoch(batch_size: int) -> list[bytes]:
        encoded.clear()
        train(*of(named_set), *ALL, f"--train_batch_size={batch_size}", "--max_train_epochs=1")
        return sorted(image.numpy().tobytes() for image in encoded)

    one, two = images_of_an_epoch(1), images_of_an_epoch(2)
    assert len(one) == 6
    assert len(set(one)) == 6  # no two visits of an image are alike
    assert one == two


@pytest.mark.slow  # a run of four epochs; tests/images/test_augmentation.py has the draws
def test_every_epoch_varies(train, named_set: PreparedSet, encoded):
    train(*of(named_set), "--random_crop", "--color_aug", "--enable_bucket", "--max_train_epochs=4")
    assert len(encoded) == 12
    assert len({image.numpy().tobytes() for image in encoded}) > 9


# -- what the model is told -------------------------------------------------------------------------------------------


def test_the_model_is_told_the_crop_that_is_drawn_even_where_latents_lie_beside_the_images(
    train, prepared_set: PreparedSet, unet_inputs
):
    train("--random_crop", "--max_train_epochs=8")
    told = [tuple(row) for call in unet_inputs for row in call["time_ids"].tolist()]
    # As in the other test of sizes, but the crop is anywhere: rows of coffee, columns of astronaut, rows of chelsea.
    crops = {size: {row[2:4] for row in told if row[:2] == size} for size in ((62, 240), (130, 140), (150, 130))}
    assert all(len(found) > 1 for found in crops.values())
    assert crops[62, 240] <= {(top, 0) for top in range(3)}
    assert crops[130, 140] <= {(0, left) for left in range(11)}
    assert crops[150, 130] <= {(top, 0) for top in range(21)}
    assert {row[4:] for row in told} == {(64, 256), (128, 128)}


def test_a_face_is_cropped_and_the_others_are_not(train, named_set: PreparedSet, unet_inputs, capsys):
    train(*of(named_set), "--face_crop_aug_range=1.2,2.0", "--enable_bucket", "--max_train_epochs=1")
    assert "1 of 3 images are named for a face" in capsys.readouterr().out
    told = {tuple(row[:2]): tuple(row[2:4]) for call in unet_inputs for row in call["time_ids"].tolist()}
    assert told[62, 240] == (1, 0)
    assert told[150, 130] == (10, 0)
    assert told[130, 140] != (0, 5)


# -- interpolation and caches -----------------------------------------------------------------------------------------


def prepare(prepared: PreparedSet, model: Path, *flags: str) -> int:
    argv = [prepared.images, prepared.captions_json, prepared.latents_json, model, "--max_resolution=128,128"]
    return prepare_buckets_latents.main([str(argument) for argument in argv] + [*BUCKET_FLAGS, *flags])


def modified(prepared: PreparedSet) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in prepared.images.glob("*.npz")}


def test_latents_say_how_their_images_were_resized_and_another_way_makes_them_again(
    tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, train, capsys
):
    fresh = prepared_set.without_latents(tmp_path / "my set")
    assert prepare(fresh, tiny_sdxl, "--resize_interpolation=cubic") == 0
    with np.load(fresh.images / "astronaut.npz") as file, np.load(prepared_set.images / "astronaut.npz") as usual:
        assert str(file["resize_interpolation"]) == "bicubic"
        assert "resize_interpolation" not in usual.files
        assert not np.array_equal(file["latents"], usual["latents"])
    made = modified(fresh)
    assert prepare(fresh, tiny_sdxl, "--resize_interpolation=bicubic", "--skip_existing") == 0
    assert modified(fresh) == made

    to_disk = (f"--in_json={fresh.latents_json}", f"--train_data_dir={fresh.images}", "--cache_latents_to_disk")
    capsys.readouterr()
    train(*to_disk, "--resize_interpolation=bicubic", "--max_train_steps=1")
    assert modified(fresh) == made
    train(*to_disk, "--max_train_steps=1")
    stale = "the image was resized by bicubic, not by the usual one (--resize_interpolation). It is encoded again."
    assert capsys.readouterr().err.count(stale) == 3
    assert all(modified(fresh)[name] != made[name] for name in made)
    with np.load(fresh.images / "astronaut.npz") as file, np.load(prepared_set.images / "astronaut.npz") as usual:
        np.testing.assert_array_equal(file["latents"], usual["latents"])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_latents", "--random_crop"], "--cache_latents cannot work with --random_crop"),
        (
            ["--cache_latents_to_disk", "--color_aug", "--face_crop_aug_range=2,4"],
            "--cache_latents_to_disk cannot work with --color_aug and --face_crop_aug_range",
        ),
        (["--legacy_crop_coords", "--random_crop"], "--legacy_crop_coords cannot work with --random_crop"),
        (["--face_crop_aug_range=4,2"], "--face_crop_aug_range: '4,2' is not a range."),
        (["--resize_interpolation=lanczos5"], "--resize_interpolation expects one of lanczos, nearest, "),
        (["--face_crop_aug_range=2,4"], "--face_crop_aug_range: no name of an image tells where its face is."),
    ],
)
def test_what_cannot_work_is_refused(tiny_sdxl, prepared_set: PreparedSet, tmp_path: Path, capsys, flags, message):
    forget_accelerator()
    argv = base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / "output")
    assert sdxl_train.main([*argv, "--max_train_steps=1", *flags]) == 2
    assert message in capsys.readouterr().err


def test_latents_without_their_image_do_not_serve(tiny_sdxl, prepared_set: PreparedSet, tmp_path: Path, capsys):
    moved = PreparedSet(tmp_path / "my set")
    shutil.copytree(prepared_set.folder, moved.folder)
    (moved.images / "coffee.jpg").unlink()
    forget_accelerator()
    argv = base_flags(tiny_sdxl, moved.latents_json, moved.images, tmp_path / "output")
    assert sdxl_train.main([*argv, "--max_train_steps=1", "--random_crop"]) == 2
    said = capsys.readouterr().err
    assert "1 images of" in said
    assert "coffee" in said
    assert "Latents alone do not serve" in said


def test_another_way_of_varying_is_not_the_run_that_was_saved(tiny_sdxl, named_set, whole_run: Run, tmp_path, capsys):
    forget_accelerator()
    flags = [flag for flag in ALL if flag != "--color_aug"]
    state = whole_run.output / "m-step00000004-state"
    argv = [*whole_run.argv, *flags, f"--resume={state}", f"--output_dir={tmp_path / 'other'}", "--color_aug=false"]
    assert sdxl_train.main(argv) == 2
    assert "--color_aug: True then, False now" in capsys.readouterr().err
