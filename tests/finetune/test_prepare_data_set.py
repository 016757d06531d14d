"""A data set file prepared: every cache under the name that training reads, and training that encodes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sdxl_train
from finetune import prepare_buckets_latents
from library.data.latent_cache import read_cache
from library.sdxl.sizes import Size
from tests.conftest import PreparedSet, forget_accelerator

BUCKETS = "min_bucket_reso = 64\nmax_bucket_reso = 256\nbucket_reso_steps = 64\n"
SETS = f"""
[general]
enable_bucket = true
resolution = 128
{BUCKETS}
[[datasets]]
  [[datasets.subsets]]
  image_dir = "photos"
  flip_aug = true
  [[datasets.subsets]]
  metadata_file = "tags/meta.json"
  cache_info = true
  resize_interpolation = "bilinear"
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = "photos"
"""
CACHES = [
    "photos/chelsea_128x128.npz",
    "photos/chelsea_64x64.npz",
    "photos/coffee_256x64.npz",
    "photos/coffee_64x64.npz",
    "tags/astronaut.npz",
]


@pytest.fixture
def sets(prepared_set: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file `sets.toml` of a folder in two resolutions and a folder with metadata."""
    monkeypatch.chdir(tmp_path)
    for folder, names in (("photos", ("chelsea", "coffee")), ("tags", ("astronaut",))):
        Path(folder).mkdir()
        for name in names:
            for suffix in (".jpg", ".txt", ".caption"):
                shutil.copy(prepared_set.images / f"{name}{suffix}", folder)
    Path("tags/meta.json").write_text(json.dumps({"astronaut": {"captionL": "style", "captionG": "content"}}))
    Path("sets.toml").write_text(SETS)
    return tmp_path


def prepare(model: Path, *flags: str) -> int:
    return prepare_buckets_latents.main(["--dataset_config=sets.toml", str(model), *flags])


def caches() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*.npz"))


def train(model: Path, output: str, *flags: str) -> dict[str, torch.Tensor]:
    forget_accelerator()
    files = [f"--pretrained_model_name_or_path={model}", "--dataset_config=sets.toml", f"--output_dir={output}"]
    settings = ["--output_name=m", "--seed=7", "--max_train_steps=4", "--max_data_loader_n_workers=0"]
    rate = ["--optimizer_type=torch.optim.SGD", "--learning_rate=0.1"]
    assert sdxl_train.main([*files, *settings, *rate, *flags]) == 0
    return load_file(Path(output) / "m.safetensors")


def test_training_reads_what_was_prepared_and_encodes_nothing(tiny_sdxl: Path, sets: Path, capsys):
    uncached = train(tiny_sdxl, "uncached")
    for path in Path().rglob("*.caption"):
        path.rename(path.with_suffix(".later"))  # latents can be made before captions are written
    assert prepare(tiny_sdxl) == 0
    assert "5 images (0 had their latents)" in capsys.readouterr().out
    for path in Path().rglob("*.later"):
        path.rename(path.with_suffix(".caption"))
    assert caches() == CACHES
    assert read_cache(Path(CACHES[0])).latents_flipped is not None
    assert read_cache(Path(CACHES[1])).latents_flipped is None
    assert read_cache(Path(CACHES[2])).bucket == Size(256, 64)
    assert read_cache(Path(CACHES[4])).resize_interpolation == "bilinear"
    for path in Path().rglob("*.jpg"):  # whoever encoded these would train something else
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size).save(path)
    cached = train(tiny_sdxl, "cached", "--skip_cache_check")
    assert all(torch.equal(cached[name], weight) for name, weight in uncached.items())


def test_what_fits_is_kept_and_the_rest_is_encoded_and_what_is_unusable_named(vae_only: Path, sets: Path, capsys):
    assert prepare(vae_only) == 0
    written = {path: Path(path).stat().st_mtime_ns for path in caches()}
    Path(CACHES[0]).unlink()
    Path("photos/broken.png").write_bytes(b"no image")
    capsys.readouterr()
    assert prepare(vae_only) == 1
    said = capsys.readouterr().out
    assert "5 images (4 had their latents)" in said
    assert "2 images could not be used:\n  'photos/broken.png'" in said  # in either resolution
    assert [path for path in caches() if Path(path).stat().st_mtime_ns != written[path]] == CACHES[:1]
    Path("photos/broken.png").unlink()
    assert prepare(vae_only, "--skip_existing=false") == 0
    assert "5 images (0 had their latents)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", "--dataset_config: there is no file 'sets.toml'"),
        ("photos", "photoes", "image_dir: there is no folder 'photoes'"),
        (
            "resolution = 64",
            "resolution = 128\nresize_interpolation = 'area'",
            "different latents to 'photos/chelsea.npz'",
        ),
        ("flip_aug", "flip_augg", "line 12: [[datasets.subsets]] has no key 'flip_augg'. Did you mean flip_aug?"),
    ],
)
def test_a_mistake_is_named_before_the_model_is_read(old: str, new: str, message: str, sets: Path, capsys):
    if old:
        Path("sets.toml").write_text(SETS.replace(old, new))
    else:
        Path("sets.toml").unlink()
    assert prepare(Path("no model")) == 2
    assert message in capsys.readouterr().err


def test_a_subset_whose_pixels_change_needs_no_latents(vae_only: Path, sets: Path, capsys):
    Path("sets.toml").write_text(SETS.replace("flip_aug", "color_aug"))
    assert prepare(vae_only) == 0
    assert "images of 'photos' are encoded in every step, because of color_aug" in capsys.readouterr().out
    assert "photos/chelsea_128x128.npz" not in caches()


def test_shards_are_refused_for_they_lie_beside_metadata(vae_only: Path, sets: Path, capsys):
    assert prepare(vae_only, "--latents_as=shards") == 2
    assert "--latents_as=shards needs a metadata file, beside which the shards lie." in capsys.readouterr().err
