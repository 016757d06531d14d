"""The tiny SDXL trained from a data set file: no metadata, several subsets and resolutions, cached and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sdxl_train
from tests.conftest import BUCKET_FLAGS, PreparedSet, forget_accelerator


def test_a_run_reads_two_resolutions_of_a_folder_and_names_their_caches(
    tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, capsys
):
    images = tmp_path / "my images"
    shutil.copytree(prepared_set.images, images, ignore=shutil.ignore_patterns("*.npz"))
    config = tmp_path / "sets.toml"
    config.write_text(
        "[general]\nenable_bucket = true\n"
        "[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = 'my images'\nnum_repeats = 2\n"
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'my images'\nshuffle_caption_l = true\n"
    )
    forget_accelerator()
    flags = [f"--pretrained_model_name_or_path={tiny_sdxl}", f"--dataset_config={config}", *BUCKET_FLAGS]
    flags += [f"--output_dir={tmp_path / 'out'}", "--output_name=m", "--max_train_epochs=1", "--cache_latents_to_disk"]
    assert sdxl_train.main([*flags, "--max_data_loader_n_workers=0", "--seed=7"]) == 0
    assert (tmp_path / "out" / "m.safetensors").is_file()
    names = sorted(path.name for path in images.glob("*.npz"))
    assert len(names) == 6 and "astronaut_128x128.npz" in names and "astronaut_64x64.npz" in names
    assert "9 steps" in capsys.readouterr().out


TWO_SUBSETS = """
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 64
resolution = 128
batch_size = 1
caption_dropout_rate = 0.2

[[datasets]]
  [[datasets.subsets]]
  image_dir = "tags"
  num_repeats = 2
  shuffle_caption_l = true
  caption_variants_l = 3
  keep_tokens_l = 1
  enable_wildcard_g = true

  [[datasets.subsets]]
  image_dir = "photos"
  caption_dropout_rate_l = 0.3
  caption_prefix_l = "photograph,"
"""


@pytest.fixture
def two_folders(prepared_set: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set file `set.toml` of two folders without metadata, in the current folder."""
    monkeypatch.chdir(tmp_path)
    pictures = sorted(path for path in prepared_set.images.iterdir() if path.suffix in (".png", ".jpg"))
    for folder, files in (("tags", pictures[:2]), ("photos", pictures[2:])):
        Path(folder).mkdir()
        for number, file in enumerate(files):
            shutil.copy(file, folder)
            Path(folder, f"{file.stem}.txt").write_text(f"tag {number}, dusk, grain, soft", encoding="utf-8")
            Path(folder, f"{file.stem}.caption").write_text(f"a {{red|blue}} thing, number {number}", encoding="utf-8")
    Path("set.toml").write_text(TWO_SUBSETS, encoding="utf-8")


def run_of_file(tiny_sdxl: Path, output: str, *flags: str) -> Path:
    forget_accelerator()
    argv = [f"--pretrained_model_name_or_path={tiny_sdxl}", "--dataset_config=set.toml", f"--output_dir={output}"]
    settings = ("--output_name=m", "--seed=7", "--max_train_steps=6", "--max_data_loader_n_workers=0")
    training = ("--optimizer_type=torch.optim.SGD", "--learning_rate=0.1", "--resolution=128")
    assert sdxl_train.main([*argv, *settings, *training, *flags]) == 0
    return Path(output)


def test_two_subsets_with_cached_texts_dropout_and_shuffled_tags_train_resume_and_draw_their_grid(
    two_folders, tiny_sdxl: Path, capsys
):
    Path("prompts.txt").write_text("a cat --e dusk --w 64 --h 64 --s 1 --d 3\na dog --e noon\n", encoding="utf-8")
    flags = (
        "--cache_text_encoder_outputs_l",
        "--cache_text_encoder_outputs_g",
        "--save_every_n_steps=3",
        "--save_state",
    )
    samples = ("--sample_prompts=prompts.txt", "--sample_grid")
    whole = run_of_file(tiny_sdxl, "whole", *flags, *samples)
    said = capsys.readouterr().out
    assert "captions of 'tags': L from *.txt" in said
    assert "captions of 'photos' dropped: both 20 %, L alone 30 %" in said
    # The grid holds each L prompt with each G prompt: its last cell is the picture of the second pair.
    grids = sorted((whole / "sample").glob("*grid*.png"))
    assert len(grids) == 2
    with Image.open(grids[-1]) as picture:
        assert picture.width > 2 * 64
        assert picture.height > 2 * 64
    shutil.copytree(whole / "m-step00000003-state", "resumed/m-step00000003-state")
    resumed = run_of_file(tiny_sdxl, "resumed", *flags, "--resume=resumed/m-step00000003-state")
    expected, got = load_file(whole / "m.safetensors"), load_file(resumed / "m.safetensors")
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    uncached = load_file(run_of_file(tiny_sdxl, "uncached") / "m.safetensors")
    assert all(torch.equal(uncached[name], weight) for name, weight in expected.items())


def test_a_dry_run_reads_the_file_too(two_folders, tiny_sdxl: Path, capsys):
    run_of_file(tiny_sdxl, "output", "--dry_run", "--dry_run_report=dry.jsonl")
    assert "latents are missing" in capsys.readouterr().out
    assert len(Path("dry.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert not Path("output").exists()


def test_folders_named_by_repeats_are_read_as_sd_scripts_reads_them(two_folders, tiny_sdxl: Path, capsys):
    for old, new in (("tags", "data/3_red cat"), ("photos", "reg/1_cat")):
        Path(new).parent.mkdir()
        Path(old).rename(new)
    file = min(Path("data/3_red cat").glob("*.txt"))
    for suffix in (".txt", ".caption"):
        file.with_suffix(suffix).unlink()
    for name in ("data/unnumbered", "data/00_none", "data/notes"):
        Path(name).mkdir()
    for name in ("data/unnumbered/a.png", "data/00_none/a.jpg", "data/loose.webp", "data/notes/a.txt"):
        Path(name).touch()
    forget_accelerator()
    argv = [f"--pretrained_model_name_or_path={tiny_sdxl}", "--output_dir=out", "--output_name=m", "--seed=7"]
    argv += [
        "--train_data_dir=data",
        "--reg_data_dir=reg",
        "--prior_loss_weight=0.5",
        "--resolution=128",
        *BUCKET_FLAGS,
    ]
    assert (
        sdxl_train.main([*argv, "--resolution=128", "--enable_bucket", "--dry_run", "--dry_run_report=dry.jsonl"]) == 0
    )
    said, warned = capsys.readouterr()
    assert "only folders of 'data' named as 10_name are: '00_none', 'loose.webp', 'unnumbered'\n" in said + warned
    assert "3 images in 12 batches, 12 steps per epoch" in said  # two images three times, one as often as both
    texts = {
        json.loads(line)["key"]: json.loads(line)["visits"][0]["caption_l"]["text"]
        for line in Path("dry.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert texts[f"3_red cat/{file.stem}"] == "red cat"
    assert [key for key in texts if key.startswith("reg/1_cat/")]
    assert sorted(texts.values())[1:] == ["tag 0, dusk, grain, soft", "tag 1, dusk, grain, soft"]
    forget_accelerator()
    assert sdxl_train.main([*argv, "--in_json=meta.json"]) == 2
    assert "--reg_data_dir cannot be used with --in_json" in capsys.readouterr().err
