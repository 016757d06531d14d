"""All that is wrong with a training set is named at once, before a model is opened; what is odd is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdxl_train
from tests.conftest import base_flags, forget_accelerator

ENTRY = {"captionL": "style", "captionG": "content"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with a good image, several bad ones, and a model that is no model."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/good.png")
    Path("images/no image.png").write_bytes(b"text")
    Path("images/empty.jpg").write_bytes(b"")
    Path("images/cut.png").write_bytes(Path("images/good.png").read_bytes()[:-20])
    Image.new("RGB", (2, 900)).save("images/thread.png")
    Path("images/damaged.npz").write_bytes(b"PK")
    write_cache("narrow", (4, 8, 8))
    Path("model.safetensors").write_bytes(b"nothing")


def write_cache(name: str, shape: tuple[int, ...]) -> None:
    latents = np.zeros(shape, np.float32)
    np.savez(Path("images") / f"{name}.npz", latents=latents, original_size=[64, 64], crop_ltrb=[0, 0, 64, 64])


def said(entries: dict[str, dict], capsys, *flags: str):
    Path("meta.json").write_text(json.dumps(entries), encoding="utf-8")
    forget_accelerator()
    capsys.readouterr()
    argv = [*base_flags("model.safetensors", "meta.json", "images", "output"), *flags]
    assert sdxl_train.main(argv) == 2
    return capsys.readouterr()


BAD = {
    "gone": "are not in 'images': gone",
    "no image": "no image.png' cannot be used",
    "empty": "empty.jpg' cannot be used",
    "cut": "cut.png' cannot be used: ",
    "thread": "2x900 is more than 100 times as long as wide",
    "damaged": "damaged.npz' is not a usable latent cache",
    "narrow": "narrow.npz' does not fit: it is for 64x64, not 128x64",
}


@pytest.mark.parametrize("names", [[name] for name in BAD] + [list(BAD)], ids=lambda names: " ".join(names))
def test_every_image_that_cannot_be_trained_is_named_before_the_model_is_opened(names, capsys):
    entries = dict.fromkeys(["good", *names], ENTRY)
    if "narrow" in names:
        entries["narrow"] = ENTRY | {"train_resolution": [128, 64]}
    error = said(entries, capsys, "--enable_bucket", "--resolution=256").err
    assert all(BAD[name] in error for name in names)
    assert "model.safetensors" not in error
    assert "Traceback" not in error


def test_of_very_many_ten_are_named_and_the_others_counted(capsys):
    error = said({f"{number:05}": ENTRY for number in range(2_000)}, capsys).err
    assert "2000 images of 'meta.json' are not in 'images'" in error
    assert "and 1990 more" in error
    assert len(error) < 1000


def test_images_that_are_new_are_told(capsys):
    for name in ("new 1", "new 2", "unknown"):
        Image.new("RGB", (64, 64)).save(f"images/{name}.png")
    entries = {"good": ENTRY | {"train_resolution": [1024, 1024]}, "new 1": ENTRY, "new 2": ENTRY}
    out = said(entries, capsys).out
    assert "2 images have no bucket, unlike the others, and are trained at the resolution 1024x1024: 'new 1', " in out
    assert "images of 'images' are not in the metadata and are not trained: " in out
    assert "'unknown.png'" in out


@pytest.mark.parametrize(
    ("bucket", "resolution", "differs"),
    [
        ([1024, 1024], "1024", False),
        ([832, 1216], "1024", False),
        ([512, 512], "1024", True),
        ([1024, 1024], "512", True),
    ],
)
def test_a_resolution_other_than_that_of_the_buckets_is_told(bucket, resolution, differs, capsys):
    out = said({"good": ENTRY | {"train_resolution": bucket}}, capsys, f"--resolution={resolution}").out
    assert ("was prepared for other sizes than the resolution" in out) == differs
