"""Pictures that cannot be used: the preparation lists them and goes on (1), the trainer names them and ends (2)."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdxl_train
from finetune import prepare_buckets_latents
from library.training.learner import StepReport
from library.training.plan import Occasion
from library.training.progress import read_progress
from library.training.tracking import Tracker
from tests.conftest import BUCKET_FLAGS, base_flags, forget_accelerator
from tests.reliability.refusal import said_on_refusal


def _png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 60000 pixels wide and high."""
    whole = _png()
    start = whole.index(b"IHDR") + 4
    header = struct.pack(">II", 60_000, 60_000) + whole[start + 8 : start + 13]
    return whole[:start] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[start + 17 :]


WHOLE = _png()
BAD = {
    "truncated": (WHOLE[: len(WHOLE) // 2], "cannot be used"),
    "zero bytes": (b"", "the file is empty"),
    "a page of a web site": (b"<html>not found</html>", "it is not an image of a known format"),
    "a text named png": (b"a cat", "it is not an image of a known format"),
    "a film": (b"\x00\x00\x00\x20ftypisom" + bytes(64), "it is not an image of a known format"),
    "a bomb": (_bomb(), "it has too many pixels"),
    "a header alone": (WHOLE[:33], "cannot be used"),
}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the good picture and the metadata of itself and of `bad`."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("images/good.png").write_bytes(WHOLE)
    entries = {key: {"captionL": "", "captionG": ""} for key in ("good", "bad")}
    Path("meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def prepare(model: Path) -> int:
    argv = ["images", "meta.json", "out.json", str(model), "--max_resolution=64,64", *BUCKET_FLAGS]
    return prepare_buckets_latents.main(argv)


def train(model: Path, capsys) -> str:
    argv = [
        *base_flags(model, "meta.json", "images", "output"),
        *("--resolution=64,64", "--cache_latents", "--max_data_loader_n_workers=0"),
    ]
    return said_on_refusal(sdxl_train, argv, capsys)


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_the_preparation_names_a_bad_picture_and_prepares_the_others(
    content: bytes, reason: str, in_folder, tiny_sdxl: Path, capsys
):
    Path("images/bad.png").write_bytes(content)
    assert prepare(tiny_sdxl) == 1
    said = capsys.readouterr().out
    assert "1 images could not be used:" in said
    assert "bad.png' cannot be used: " in said
    assert reason in said
    assert [path.name for path in Path("images").glob("*.npz")] == ["good.npz"]
    entries = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [key for key, entry in entries.items() if "train_resolution" in entry] == ["good"]


def test_a_folder_named_like_a_picture_is_no_picture(in_folder, tiny_sdxl: Path, capsys):
    Path("images/bad.png").mkdir()
    assert prepare(tiny_sdxl) == 0
    assert (
        "1 entries of the metadata without an image stay as they are (see --remove_missing):\n  bad"
        in capsys.readouterr().out
    )
    assert "1 images of 'meta.json' are not in 'images': bad" in train(tiny_sdxl, capsys)


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "a text named png", "a bomb"])
def test_the_trainer_names_a_bad_picture(kind: str, in_folder, tiny_sdxl: Path, capsys):
    Path("images/bad.png").write_bytes(BAD[kind][0])
    said = train(tiny_sdxl, capsys)
    assert "bad.png' cannot be used: " in said
    assert "Replace the file or remove it." in said


@pytest.mark.trains
@pytest.mark.parametrize(("seed", "step_before"), [(0, 2), (1, 3)], ids=["begins an epoch", "ends an epoch"])
def test_what_was_learnt_before_a_bad_picture_is_saved(
    seed: int, step_before: int, in_folder, tiny_sdxl: Path, capsys, monkeypatch
):
    Path("images/bad.png").write_bytes(WHOLE)
    after_step = Tracker.after_step

    def log_and_damage(tracker: Tracker, occasion: Occasion, report: StepReport | None) -> None:
        after_step(tracker, occasion, report)
        if report is not None and occasion.step == 2:
            Path("images/bad.png").write_bytes(BAD["truncated"][0])

    monkeypatch.setattr(Tracker, "after_step", log_and_damage)
    argv = [
        *base_flags(tiny_sdxl, "meta.json", "images", "output"),
        *("--output_name=m", "--resolution=64,64", "--max_data_loader_n_workers=0"),
    ]
    forget_accelerator()
    assert sdxl_train.main([*argv, "--max_train_steps=6", f"--seed={seed}"]) == 2
    said = capsys.readouterr().err
    assert "bad.png' cannot be used: " in said
    [state] = Path("output").glob("m-step*-state")
    step = read_progress(state).step
    assert step == step_before
    assert f'All that was learnt in {step} steps is saved; continue with --resume "{state}"' in said
    Path("images/bad.png").write_bytes(WHOLE)
    forget_accelerator()
    assert sdxl_train.main([*argv, "--max_train_steps=6", f"--seed={seed}", "--resume=latest"]) == 0
