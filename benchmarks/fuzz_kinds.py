"""A file of every kind that the scripts read, written by the scripts, and for each kind the run that reads it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sdxl_train
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import (
    prepare_buckets_latents,
    sdxl_merge_captions_g_to_metadata,
    sdxl_merge_captions_l_to_metadata,
)
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, write_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder
from library.training.progress import FORMAT_WITHOUT_DIGESTS, PROGRESS_FILE

_SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff")
_BUCKETS = ("--min_bucket_reso=64", "--max_bucket_reso=128", "--bucket_reso_steps=64")
_PROMPTS = {
    "prompts.txt": "a cat --e photo --n blurry --w 64 --h 64 --s 1 --l 7.5 --d 3 --ss ddim\n",
    "prompts.json": '[{"prompt": "a cat", "prompt_l": "photo", "width": 64, "height": 64, "seed": 3, "scale": 7.5}]\n',
    "prompts.toml": '[prompt]\nwidth = 64\nheight = 64\n[[prompt.subset]]\nprompt = "a cat"\nseed = 3\nscale = 7.5\n',
}
_OPTIONS = """
[training]
learning_rate = 1e-4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 0
max_grad_norm = 1.0
noise_offset = 0.05
max_token_length = 75
mixed_precision = "no"
sdpa = true
seed = 7
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file: which files of the prepared folder are of it, and the run that reads them.

    `argv` makes the arguments of that run from its folder and the damaged file.
    """

    name: str
    pattern: str
    script: str
    argv: Callable[[Path, Path], list[str]]


def _train(folder: Path, **flags: str | Path) -> list[str]:
    usual: dict[str, str | Path] = {
        "pretrained_model_name_or_path": folder / "model.safetensors",
        "in_json": folder / "meta_lat.json",
        "train_data_dir": folder / "images",
        "output_dir": folder / "output",
        "output_name": "m",
        "resolution": "64,64",
        "max_train_steps": "1",
        "max_data_loader_n_workers": "0",
        "seed": "7",
    }
    switches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", *_BUCKETS]
    return [*(f"--{name}={value}" for name, value in {**usual, **flags}.items()), *switches]


def _resume(folder: Path, state: str) -> list[str]:
    return [*_train(folder, resume=folder / state, max_train_steps="2"), "--resume_anyway"]


def _prepare(folder: Path, model: Path, images: str = "images") -> list[str]:
    files = [folder / images, folder / "meta_cap.json", folder / "new_lat.json", model]
    return [*map(str, files), "--max_resolution=64,64", *_BUCKETS]


def _merge(folder: Path) -> list[str]:
    return [str(folder / "images"), str(folder / "new_cap.json")]


KINDS = (
    Kind("checkpoint", "model.safetensors", "train", lambda folder, _: _train(folder)),
    Kind("pickled checkpoint", "model.ckpt", "train", lambda f, file: _train(f, pretrained_model_name_or_path=file)),
    Kind(
        "configuration of a diffusers folder",
        "diffusers/**/*.json",
        "train",
        lambda folder, _: _train(folder, pretrained_model_name_or_path=folder / "diffusers"),
    ),
    Kind(
        "weights of a diffusers folder",
        "diffusers/**/*.safetensors",
        "train",
        lambda folder, _: _train(folder, pretrained_model_name_or_path=folder / "diffusers"),
    ),
    Kind("VAE", "model.safetensors", "prepare", _prepare),
    Kind("latents", "images/*.npz", "train", lambda folder, _: _train(folder)),
    Kind("text encoder outputs", "images/text_encoder_outputs/**/*.safetensors", "train", lambda f, _: _train(f)),
    Kind("metadata, in training", "meta_lat.json", "train", lambda folder, _: _train(folder)),
    Kind("metadata, in the preparation", "meta_cap.json", "prepare", lambda f, _: _prepare(f, f / "model.safetensors")),
    Kind("metadata, merged into", "meta_cap.json", "merge_l", lambda f, file: [str(f / "images"), str(file)]),
    Kind(
        "prompts",
        "prompts.*",
        "train",
        lambda folder, file: _train(folder, sample_prompts=file, sample_every_n_steps="100"),
    ),
    Kind("options", "options.toml", "train", lambda folder, file: _train(folder, config_file=file)),
    Kind("state", "state/*", "train", lambda folder, _: _resume(folder, "state")),
    Kind("state of an earlier version", "old_state/*", "train", lambda folder, _: _resume(folder, "old_state")),
    Kind("images", "images/*.[pjwgbt]*[gfp]", "prepare", lambda f, _: _prepare(f, f / "model.safetensors")),
    Kind("captions of L", "images/*.txt", "merge_l", lambda folder, _: _merge(folder)),
    Kind("captions of G", "images/*.caption", "merge_g", lambda folder, _: _merge(folder)),
)


def make_whole_files(folder: Path) -> None:
    """Write a file of every kind to `folder`, by the scripts themselves. Raise `RuntimeError` if one fails."""
    images = folder / "images"
    images.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for number, suffix in enumerate(_SUFFIXES):
        image = Image.fromarray(pixels.integers(0, 256, (66 + number, 70, 3), dtype=np.uint8))
        image.save(images / f"{number:02d}{suffix}")
        (images / f"{number:02d}.caption").write_text(f"a cat, number {number}", encoding="utf-8")
        (images / f"{number:02d}.txt").write_text("photo, soft light", encoding="utf-8")
    for name, text in {**_PROMPTS, "options.toml": _OPTIONS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    model = folder / "model.safetensors"
    write_random_sdxl(model, TINY, torch.float16, seed=0)
    whole = read_single_file(model, ModelDtypes())
    write_single_file(folder / "model.ckpt", whole, None, {})
    write_diffusers_folder(folder / "diffusers", whole, None)
    merged = [str(images), str(folder / "meta_cap.json")]
    statuses = [
        script.main(merged) for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata)
    ]
    statuses.append(prepare_buckets_latents.main(_prepare(folder, model)))
    (folder / "new_lat.json").rename(folder / "meta_lat.json")
    statuses.append(sdxl_train.main([*_train(folder), "--save_state_on_train_end"]))
    if any(statuses):
        raise RuntimeError("the whole files could not be made")
    (folder / "output" / "m-state").rename(folder / "state")
    shutil.rmtree(folder / "output")
    shutil.copytree(folder / "state", folder / "old_state")
    record = json.loads((folder / "old_state" / PROGRESS_FILE).read_text(encoding="utf-8"))
    older = {key: value for key, value in record.items() if key not in ("digest", "digests")}
    older["format"] = FORMAT_WITHOUT_DIGESTS
    (folder / "old_state" / PROGRESS_FILE).write_text(json.dumps(older), encoding="utf-8")
