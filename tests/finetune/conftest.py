"""Folders to prepare: pictures and metadata of one test, and a VAE of their own."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from finetune import prepare_buckets_latents
from library.data.latent_cache import read_cache

SIZE = (100, 60)
SMALL_BUCKETS = ("--max_resolution=64,64", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=32")


def noise_picture(size, name):
    """A picture of noise, another one for each name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@dataclass(frozen=True)
class TrainingFolder:
    """Pictures and metadata of one test, in folders whose names hold what shells stumble over."""

    root: Path
    model: Path

    @property
    def images(self) -> Path:
        return self.root / "my images"

    @property
    def in_json(self) -> Path:
        return self.root / "meta cap.json"

    @property
    def out_json(self) -> Path:
        return self.root / "meta lat.json"

    def add(self, name, picture=None, **options):
        """Save a picture: an image, its size (noise is drawn), or the bytes of the file."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            image = picture if isinstance(picture, Image.Image) else noise_picture(picture or SIZE, name)
            image.save(path, **options)
        return path

    def captions_for(self, *keys, **entries):
        """Write the metadata: captions for these keys, or whole entries."""
        metadata = {str(key): {"captionG": f"content of {key}", "captionL": "style"} for key in keys} | entries
        self.in_json.write_text(json.dumps(metadata), encoding="utf-8")

    def prepare(self, *flags, buckets=SMALL_BUCKETS, model=None):
        """Run the script and return its exit status."""
        arguments = [self.images, self.in_json, self.out_json, model or self.model, *buckets, *flags]
        return prepare_buckets_latents.main([str(argument) for argument in arguments])

    def prepare_lines(self, lines, *flags, out="meta lat.json"):
        """Run the script on JSONL of these objects; return what it wrote."""
        in_json = self.root / "meta.jsonl"
        in_json.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        arguments = [self.images, in_json, self.root / out, self.model, *SMALL_BUCKETS, *flags]
        assert prepare_buckets_latents.main([str(argument) for argument in arguments]) == 0
        return (self.root / out).read_text(encoding="utf-8")

    def prepare_all(self, *flags, **options):
        """The same, for a set without mistakes, with metadata for every picture at the top."""
        self.captions_for(*(path.stem for path in self.images.iterdir() if path.suffix != ".npz"))
        assert self.prepare(*flags, **options) == 0

    def resolutions(self):
        """`train_resolution` of each key in the written metadata, None where there is none."""
        metadata = json.loads(self.out_json.read_text(encoding="utf-8"))
        return {key: entry.get("train_resolution") for key, entry in metadata.items()}

    def cached(self, name):
        return read_cache(self.images / f"{name}.npz")

    def caches(self):
        return sorted(path.relative_to(self.images).as_posix() for path in self.images.rglob("*.npz"))


@pytest.fixture(scope="session")
def write_vae(tiny_sdxl, tmp_path_factory):
    """`write_vae(name, change)` writes the tensors of the tiny SDXL's VAE alone, in float32, after `change` of them."""
    folder = tmp_path_factory.mktemp("vae")

    def write(name, change=lambda tensors: None):
        with safe_open(tiny_sdxl, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("first_stage_model.")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name).float() for name in names}
            metadata = file.metadata()
        change(tensors)
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        return folder / f"{name}.safetensors"

    return write


@pytest.fixture(scope="session")
def vae_only(write_vae):
    """All of the tiny SDXL that the script may need."""
    return write_vae("only the vae")


@pytest.fixture
def folder(tmp_path, vae_only):
    """An empty set."""
    made = TrainingFolder(tmp_path / "my set ü 颐", vae_only)
    made.images.mkdir(parents=True)
    return made
