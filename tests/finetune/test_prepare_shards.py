"""`--latents_as=shards`: the same numbers as in .npz files, for the trainer too, and every damage is named."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.errors import UserError
from library.data import shard_preparation
from library.data.fingerprints import Fingerprints
from library.data.latent_cache import read_cache
from library.data.latent_index import index_beside
from library.data.latent_preparation import encode_missing
from library.data.latent_shards import MANIFEST, read_shards, shards_path
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketRule
from library.sdxl.checkpoint_file import read_vae
from library.sdxl.latents import vae_digest
from library.sdxl.sizes import Size
from tests.finetune.conftest import TrainingFolder
from tests.training_images import read_set

RULE = BucketRule(Size(64, 64), 32, 128, 32, no_upscale=False)


@dataclass
class Sets:
    """One folder of images, prepared into .npz files (kept aside) and into shards."""

    folder: TrainingFolder
    arrays: dict
    digest: str

    @property
    def shards(self) -> Path:
        return shards_path(self.folder.out_json)

    def read(self, **flags):
        options = TrainingSetOptions(train_data_dir=self.folder.images, in_json=self.folder.out_json, **flags)
        return read_set(options, RULE, self.digest)


@pytest.fixture(scope="module")
def template(tmp_path_factory, vae_only):
    """Five images of two buckets, with transparency, in three shards; and what their .npz files held."""
    folder = TrainingFolder(tmp_path_factory.mktemp("sets") / "my set ü", vae_only)
    folder.images.mkdir(parents=True)
    for name, size in {"a": (100, 60), "b": (60, 100), "c": (100, 60), "d ü": (100, 60), "e": (60, 100)}.items():
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size[1], size[0], 4))
        os.utime(folder.add(f"{name}.png", Image.fromarray(pixels.astype(np.uint8), "RGBA")), (1.7e9, 1.7e9 + 0.5))
    folder.prepare_all("--flip_aug", "--alpha_mask")
    arrays = {path.stem: read_cache(path) for path in folder.images.glob("*.npz")}
    for path in folder.images.glob("*.npz"):
        path.unlink()
    shutil.rmtree(index_beside(folder.out_json))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_preparation, "ROWS", 2)
        assert folder.prepare("--flip_aug", "--alpha_mask", "--latents_as=shards") == 0
    return Sets(folder, arrays, vae_digest(read_vae(folder.model, torch.float32)))


@pytest.fixture
def sets(template, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(shard_preparation, "ROWS", 2)
    root = tmp_path / "my set ü"
    shutil.copytree(template.folder.root, root)
    return replace(template, folder=replace(template.folder, root=root))


def test_visits_are_bit_for_bit_those_of_npz_files_and_of_memory(sets):
    images = sets.read(flip_aug=True, alpha_mask=True)
    assert list(sets.folder.images.glob("*.npz")) == []
    assert len(list(sets.shards.glob("*.safetensors"))) == 3
    sources = {image.key: image for image in read_set_without_shards(sets)}
    encoded = encode_missing(
        [replace(image, latents=None) for image in sources.values()],
        read_vae(sets.folder.model, torch.float32),
        TrainingSetOptions(cache_latents=True, flip_aug=True),
    )
    for image, other in zip(images, encoded, strict=True):
        expected = sets.arrays[image.key]
        for flipped in (False, True):
            latents, mask = image.sample(flipped=flipped)
            assert latents.tobytes() == expected.in_direction(flipped=flipped).tobytes()
            assert latents.tobytes() == other.sample(flipped=flipped)[0].tobytes()
            assert mask.tobytes() == expected.alpha_mask.tobytes() == other.sample(flipped=flipped)[1].tobytes()
        assert (image.size, image.bucket, image.crop) == (other.size, other.bucket, other.crop)
    assert dict(Fingerprints(images)) == dict(Fingerprints(encoded))  # so that a run resumes across the change


def read_set_without_shards(sets):
    """The set as it is without any latents."""
    away = sets.shards.rename(sets.folder.root / "away")
    images = sets.read(flip_aug=True, alpha_mask=True)
    away.rename(sets.shards)
    assert not any(image.has_latents for image in images)
    return images


def test_a_start_opens_neither_images_nor_latents(sets, monkeypatch):
    monkeypatch.setattr("library.data.latents_of_set._noted", lambda *_: pytest.fail("it reads"))
    assert sets.read(flip_aug=True, alpha_mask=True).all_have_latents


def test_images_may_be_gone_or_another(sets, capsys):
    sets.folder.add("a.png", (100, 60))
    (sets.folder.images / "b.png").unlink()
    images = {image.key: image for image in sets.read()}
    assert not images["a"].has_latents
    assert images["b"].has_latents
    assert f"'a' in '{sets.shards}" in (said := capsys.readouterr().err)
    assert "does not fit: the image has changed. It is encoded again." in said


def test_bf16_halves_them_and_is_another_set_to_a_resumed_run(sets, capsys):
    before = dict(Fingerprints(sets.read()))
    num_bytes = sum(path.stat().st_size for path in sets.shards.glob("*.safetensors"))
    assert sets.folder.prepare("--flip_aug", "--alpha_mask", "--latents_as=shards", "--latents_dtype=bf16") == 0
    assert "kept in bfloat16: half as large" in capsys.readouterr().out
    images = sets.read(flip_aug=True, alpha_mask=True)
    assert sum(path.stat().st_size for path in sets.shards.glob("*.safetensors")) < 0.8 * num_bytes
    for image in images:
        latents, mask = image.sample(flipped=True)
        expected = torch.from_numpy(sets.arrays[image.key].latents_flipped)
        assert torch.equal(torch.from_numpy(latents), expected.to(torch.bfloat16).float())
        assert mask.tobytes() == sets.arrays[image.key].alpha_mask.tobytes()
    assert all(before[key] != fingerprint for key, fingerprint in Fingerprints(images).items())


def test_what_fits_is_kept_and_new_images_are_added(sets, capsys):
    before = {path.name for path in sets.shards.glob("*.safetensors")}
    arguments = ("--flip_aug", "--alpha_mask", "--latents_as=shards", "--skip_existing")
    assert sets.folder.prepare(*arguments) == 0
    assert "5 images (5 had their latents)" in capsys.readouterr().out
    assert {path.name for path in sets.shards.glob("*.safetensors")} == before
    sets.folder.add("f.png", Image.new("RGBA", (100, 60), (9, 200, 7, 255)))
    sets.folder.captions_for(*sets.arrays, "f")
    capsys.readouterr()
    sets.folder.in_json.replace(sets.folder.out_json)
    images = sets.read()
    assert [image.key for image in images if not image.has_latents] == ["f"]
    assert "lack 1 images, whose latents are looked for beside them: 'f'" in capsys.readouterr().err
    sets.folder.out_json.replace(sets.folder.in_json)
    (sets.shards / "mine.safetensors").write_bytes(b"a file of somebody else")
    assert sets.folder.prepare(*arguments) == 0
    assert not before <= {path.name for path in sets.shards.iterdir()}
    assert (sets.shards / "mine.safetensors").read_bytes() == b"a file of somebody else"
    assert "6 images (5 had their latents)" in capsys.readouterr().out
    assert sets.read(flip_aug=True, alpha_mask=True).all_have_latents
    assert sorted(read_shards(sets.shards).keys) == sorted([*sets.arrays, "f"])
    assert not (sets.shards / "parts").exists()


def test_npz_files_that_fit_need_not_be_encoded_again(sets, monkeypatch):
    shutil.rmtree(sets.shards)
    assert sets.folder.prepare("--flip_aug", "--alpha_mask") == 0
    monkeypatch.setattr(shard_preparation, "encode_images", lambda images, *_, **__: pytest.fail("it encodes"))
    monkeypatch.setattr(shard_preparation, "write_cache", lambda *_: pytest.fail("it encodes"))
    assert sets.folder.prepare("--flip_aug", "--alpha_mask", "--latents_as=shards", "--skip_existing") == 0
    assert sets.read(flip_aug=True, alpha_mask=True).all_have_latents


def test_one_image_may_have_two_entries(sets):
    shutil.rmtree(sets.shards)
    names = ["a.png", "./a.png", "c.png", "b.png"]
    lines = [{"image_path": name, "captionL": "style", "captionG": f"content of {name}"} for name in names]
    for flags in ((), ("--skip_existing",)):
        sets.folder.prepare_lines(lines, "--latents_as=shards", *flags)
        images = sets.read()
        assert [image.key for image in images] == names
        for image in images:
            assert image.sample(flipped=False)[0].tobytes() == sets.arrays[Path(image.key).stem].latents.tobytes()


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content = content[:-100]
    elif how == "bit of a fact":
        at = content.index(b"vae_blake2b") + len(b'vae_blake2b":"')
        content[at] ^= 1
    elif how == "empty":
        content = bytearray()
    elif how == "text":
        content = bytearray(b"[]" * 500)
    path.unlink()
    if how != "missing":
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "said"),
    {
        "missing": "is missing",
        "cut off": "cannot be used (it is cut off)",
        "bit of a fact": "cannot be used (its facts are not as they were written)",
        "empty": "cannot be used",
        "text": "cannot be used",
    }.items(),
)
def test_a_bad_shard_is_named_and_prepared_again(sets, capsys, how, said):
    path = min(sets.shards.glob("*.safetensors"))
    before = path.read_bytes()
    spoil(path, how)
    with pytest.raises(UserError) as raised:
        sets.read()
    assert f"the shard '{path}' {said}" in str(raised.value)
    assert "--latents_as=shards --skip_existing" in raised.value.remedy
    assert sets.folder.prepare("--flip_aug", "--alpha_mask", "--latents_as=shards", "--skip_existing") == 0
    assert path.read_bytes() == before
    assert "5 images (3 had their latents)" in capsys.readouterr().out


def test_a_flipped_bit_of_latents_is_never_trained_on(sets, capsys):
    shard = read_shards(sets.shards).shards[0]
    content, state = bytearray(shard.path.read_bytes()), shard.path.stat()
    content[int(shard.places["offsets"][1, 0]) + 50] ^= 16
    shard.path.write_bytes(content)
    os.utime(shard.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    images = {image.key: image for image in sets.read()}
    assert images[shard.keys[1]].has_latents  # size and time are those of the index
    with pytest.raises(UserError, match="is damaged, or was replaced after it was opened"):
        images[shard.keys[1]].sample(flipped=False)
    images[shard.keys[0]].sample(flipped=False)
    checked = sets.read(check_latents=True)
    assert [image.key for image in checked if not image.has_latents] == [shard.keys[1]]
    assert "is damaged" in capsys.readouterr().err


def test_an_image_in_two_shards_is_named(sets):
    path = min(sets.shards.glob("*.safetensors"))
    other = path.with_name(f"again{path.name}")
    shutil.copy(path, other)
    names = json.loads((sets.shards / MANIFEST).read_text())
    names["files"].append(other.name)
    (sets.shards / MANIFEST).write_text(json.dumps(names))
    with pytest.raises(UserError, match="holds 2 images twice: ") as raised:
        sets.read()
    assert "--skip_existing" in raised.value.remedy


@pytest.mark.parametrize("content", ['{"format": 99, "files": []}', "{", '{"format": 1}', "[]"])
def test_a_bad_manifest_is_named(sets, content):
    (sets.shards / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest.json' cannot be read"):
        sets.read()
    assert sets.folder.prepare("--flip_aug", "--alpha_mask", "--latents_as=shards", "--skip_existing") == 0
    assert sets.read().all_have_latents


def test_npz_files_of_bf16_are_refused(folder, capsys):
    assert folder.prepare("--latents_dtype=bf16") == 2
    assert "--latents_dtype: .npz files are float32; add --latents_as=shards." in capsys.readouterr().err
