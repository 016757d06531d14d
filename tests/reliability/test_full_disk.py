"""A disk that fills up: what was there stays, the run goes on, the message says what happened."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import sdxl_train
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata
from library.config.atomic_files import replacing, require_disk_space
from library.config.errors import UserError
from library.training import checkpoints
from library.training.checkpoints import Checkpoints
from library.training.learner import StepReport
from library.training.plan import Occasion
from library.training.progress import Progress
from library.training.saves import SaveOptions
from library.training.tracking import Tracker
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator


class Disk:
    """A small disk that can be filled to the last byte."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    made = Disk(folder)
    yield made
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.trains
def test_training_goes_on_and_saves_again_when_there_is_room(
    disk: Disk, tiny_sdxl: Path, prepared_set: PreparedSet, monkeypatch, capsys
):
    after_step = Tracker.after_step

    def log_and_fill(tracker: Tracker, occasion: Occasion, report: StepReport | None) -> None:
        after_step(tracker, occasion, report)
        if occasion.step == 2:
            disk.fill()
        if occasion.step == 3:
            disk.make_room()

    monkeypatch.setattr(Tracker, "after_step", log_and_fill)
    forget_accelerator()
    argv = [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, disk.folder / "output"),
        *("--output_name=m", "--seed=7", "--max_train_steps=3", "--max_data_loader_n_workers=0"),
        *("--save_every_n_steps=1", "--save_state", "--learning_rate=1e-3"),
    ]
    assert sdxl_train.main(argv) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "'m-step00000002' is not saved. Training continues and tries again at the next save" in said
    assert "No space left on device" in said
    names = {path.name for path in (disk.folder / "output").iterdir() if path.name not in ("sample", "run")}
    steps = {f"m-step0000000{step}{end}" for step in (1, 3) for end in (".safetensors", "-state")}
    assert names == steps | {"m.safetensors", "m-state"}


def test_the_finished_model_is_saved_as_soon_as_there_is_room(disk: Disk, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    # In this room alone: threads of other tests may sleep too.
    monkeypatch.setattr(
        checkpoints, "time", SimpleNamespace(sleep=lambda seconds: disk.make_room(), monotonic=time.monotonic)
    )

    def write(path: Path) -> None:
        with replacing(path) as file:
            file.write(bytes(1_000_000))

    disk.fill()
    options = SaveOptions(output_dir=disk.folder / "output", output_name="m")
    made = Checkpoints(
        options,
        Progress(step=3),
        suffix=".safetensors",
        write_model=write,
        write_state=lambda folder, progress: write(folder),
        one_writer=lambda: nullcontext(True),
    )
    made.after_step(Occasion(3, is_last=True))
    assert (disk.folder / "output" / "m.safetensors").stat().st_size == 1_000_000
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "Saving is tried again every minute" in warning.getMessage()


def test_latents_and_metadata_that_do_not_fit_leave_everything_as_it_was(
    disk: Disk, prepared_set: PreparedSet, tiny_sdxl: Path, capsys
):
    images = disk.folder / "images"
    shutil.copytree(prepared_set.images, images)
    meta = disk.folder / "meta.json"
    shutil.copy(prepared_set.captions_json, meta)
    before = {path.name: path.read_bytes() for path in (*images.iterdir(), meta)}
    disk.fill()
    argv = [images, meta, disk.folder / "meta_lat.json", tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    for kind in ("npz", "shards"):
        assert prepare_buckets_latents.main([*map(str, argv), f"--latents_as={kind}"]) == 2
        assert "to write latents of 3 images takes" in capsys.readouterr().err
    assert sdxl_merge_captions_g_to_metadata.main([str(images), str(meta)]) == 2
    assert f"cannot write '{meta}': No space left on device" in capsys.readouterr().err
    disk.make_room()
    assert {path.name: path.read_bytes() for path in (*images.iterdir(), meta)} == before


def test_a_cache_that_does_not_fit_leaves_the_old_one(prepared_set: PreparedSet, tiny_sdxl: Path, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(prepared_set.images, images)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    argv = [images, prepared_set.captions_json, tmp_path / "meta_lat.json", tiny_sdxl, *BUCKET_FLAGS]
    resource = pytest.importorskip("resource", reason="limits on files are POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file can grow beyond a kilobyte
    try:
        assert prepare_buckets_latents.main([*map(str, argv), "--max_resolution=128,128"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    assert not (tmp_path / "meta_lat.json").exists()


def test_what_is_missing_is_said_before_a_run(tmp_path: Path):
    require_disk_space(tmp_path, 1, "a byte")
    with pytest.raises(UserError, match=r"an ocean takes 1000000000\.0 GB: .* GB are missing"):
        require_disk_space(tmp_path / "not there yet", 10**18, "an ocean")
