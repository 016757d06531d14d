"""Keys and names are what strangers wrote: which files they may lead to, and that nothing is written elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from tests.conftest import PreparedSet, base_flags, forget_accelerator
from tests.reliability.refusal import said_on_refusal

pytestmark = pytest.mark.slow  # whole runs

ENTRY = {"captionL": "style", "captionG": "content"}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with images in two levels, an image that is not for training, and a model that is none."""
    monkeypatch.chdir(tmp_path)
    for name in ("images/01.png", "images/a/02.png", "images/b/02.png", "images/deep/03.png", "elsewhere/04.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(name)
    Path("model.safetensors").write_bytes(b"nothing")
    return tmp_path


def refusal(keys: list[str], capsys) -> tuple[str, str]:
    """What the trainer prints for these keys, above and in its refusal, which is of the model at the latest."""
    Path("meta.json").write_text(json.dumps(dict.fromkeys(keys, ENTRY)), encoding="utf-8")
    forget_accelerator()
    capsys.readouterr()
    assert sdxl_train.main(base_flags("model.safetensors", "meta.json", "images", "output")) == 2
    return capsys.readouterr()


MOVED = {
    "an absolute path": ["/home/somebody/set/01.png"],
    "a drive": ["C:\\my set\\01.png"],
    "a folder beside": ["../set/01.png"],
    "another suffix": ["/old/01.jpg"],
    "the end of the path decides": ["/old/a/02.png", "/old/b/02.png"],
    "a folder that went deeper": ["03.png", "/old/01.png"],
}


@pytest.mark.parametrize("keys", MOVED.values(), ids=MOVED)
def test_images_of_moved_folders_are_found_by_name_with_a_notice(keys, in_folder, capsys):
    said = refusal(keys, capsys)
    assert "model.safetensors" in said.err  # it came as far as the model
    assert f"{len(keys)} keys are paths of another place; found by name in 'images'" in said.out


NOT_MOVED = {
    "a stem": ["01"],
    "a path in the folder": ["deep/03.png"],
    "a path from here": ["images/01.png"],
    "an absolute path": ["{here}/images/01.png"],
    "backslashes": ["a\\02.png"],
}


@pytest.mark.parametrize("keys", NOT_MOVED.values(), ids=NOT_MOVED)
def test_keys_that_name_their_image_need_no_notice(keys, in_folder, capsys):
    said = refusal([key.format(here=in_folder) for key in keys], capsys)
    assert "model.safetensors" in said.err
    assert "another place" not in said.out


REFUSED = {
    "an image elsewhere, by its absolute path": (["{here}/elsewhere/04.png"], "outside the image folder 'images'"),
    "an image elsewhere, from here": (["elsewhere/04.png"], "outside the image folder 'images'"),
    "an image elsewhere, by ..": (["../{name}/elsewhere/04.png"], "outside the image folder 'images'"),
    "a name that two have": (["/old/c/02.png"], "could refer to"),
    "nothing of that name": (["/old/05.png"], "1 images of 'meta.json' are not in 'images': /old/05.png."),
    "two keys, one of them by name": (["01", "/old/01.png"], "the keys '01' and '/old/01.png' both lead to"),
    "two keys by name": (["/old/x/01.png", "/old/y/01.png"], "both lead to 'images/01.png'"),
}


@pytest.mark.parametrize(("keys", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_leads_elsewhere_or_to_two_is_refused_with_the_reason(keys, reason, in_folder, capsys):
    said = refusal([key.format(here=in_folder, name=in_folder.name) for key in keys], capsys)
    assert reason in said.err
    assert "model.safetensors" not in said.err


def test_one_image_may_have_two_entries_that_name_it(in_folder, capsys):
    assert "both lead" not in refusal(["01", "images/01.png"], capsys).err


def test_latents_without_images_follow_the_same_rule(prepared_set: PreparedSet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "elsewhere"):
        Path(folder).mkdir()
        shutil.copy(prepared_set.images / "coffee.npz", Path(folder) / f"{folder}.npz")
    Path("model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors" in refusal(["/old/images.jpg"], capsys).err
    assert "not in 'images'" in refusal([f"{tmp_path}/elsewhere/elsewhere.jpg"], capsys).err
    assert "both lead to 'images/images.npz'" in refusal(["/old/a/images.jpg", "/old/b/images.png"], capsys).err


@pytest.mark.parametrize("key", ["{here}/elsewhere/04.png", "elsewhere/04.png"])
def test_no_cache_is_written_outside_the_folder(key, in_folder, tiny_sdxl, capsys):
    Path("meta.json").write_text(json.dumps({key.format(here=in_folder): ENTRY}), encoding="utf-8")
    argv = base_flags(tiny_sdxl, "meta.json", "images", "output")
    argv += ["--cache_latents_to_disk", "--resolution=64,64"]
    assert "outside the image folder" in said_on_refusal(sdxl_train, argv, capsys)
    assert not list(in_folder.rglob("*.npz"))
