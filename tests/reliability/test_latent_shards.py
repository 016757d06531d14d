"""Shards of latents by several processes, and by processes that are killed: always the same files."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from library.data.latent_index import index_beside, read_index
from library.data.latent_shards import shards_path
from library.training.run_lock import run_lock
from tests.conftest import BUCKET_FLAGS, RATE, PreparedSet, base_flags
from tests.forked_runs import END_AT_ONCE, FOLDER, KILL_AT
from tests.outcome import differences, outcome_of


class Preparation:
    """Preparations of the same images, each into metadata of another name."""

    def __init__(self, images: Path, captions: Path, model: Path, folder: Path):
        self._images, self._captions, self._model, self._folder = images, captions, model, folder

    def argv(self, name: str, *flags: str) -> list[str]:
        """The command line that writes the metadata of a name."""
        out = self._folder / f"{name}.json"
        argv = [self._images, self._captions, out, self._model, "--max_resolution=128,128", *BUCKET_FLAGS]
        return [*map(str, argv), "--latents_as=shards", *flags]

    def files(self, name: str) -> dict[str, bytes]:
        """The shards, the manifest and the metadata of a name."""
        folder = shards_path(self._folder / f"{name}.json")
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return found | {"metadata": (self._folder / f"{name}.json").read_bytes()}


@pytest.fixture
def preparation(prepared_set: PreparedSet, tiny_sdxl: Path, tmp_path: Path) -> Preparation:
    made = prepared_set.without_latents(tmp_path / "set")
    return Preparation(made.images, made.captions_json, tiny_sdxl, tmp_path)


def by_processes(preparation: Preparation, run_processes, number: int) -> dict[str, bytes]:
    """What a number of processes write."""
    runs = run_processes(number, preparation.argv(f"by {number}"), "prepare", **{END_AT_ONCE: "1"})
    assert [run.wait() for run in runs] == [0] * number, [run.said for run in runs]
    assert runs[0].said.count("3 images (0 had their latents)") == 1
    assert not any("3 images" in run.said for run in runs[1:])
    return preparation.files(f"by {number}")


def test_two_processes_write_the_files_of_one(preparation: Preparation, run_processes):
    one, two = (by_processes(preparation, run_processes, number) for number in (1, 2))
    assert one == two
    assert len(json.loads(one["manifest.json"])["files"]) == 2


@pytest.mark.slow
def test_three_processes_write_the_files_of_one(preparation: Preparation, run_processes):
    assert by_processes(preparation, run_processes, 3) == by_processes(preparation, run_processes, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_npz_files_by_several_processes_are_those_of_one(preparation, prepared_set, tmp_path, run_processes, number):
    argv = [each for each in preparation.argv("npz") if each != "--latents_as=shards"]
    runs = run_processes(number, argv, "prepare", **{END_AT_ONCE: "1"})
    assert [run.wait() for run in runs] == [0] * number, [run.said for run in runs]
    expected = {path.name: path.read_bytes() for path in prepared_set.images.glob("*.npz")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").rglob("*.npz")} == expected
    assert (tmp_path / "npz.json").read_bytes() == prepared_set.latents_json.read_bytes()
    assert len(read_index(index_beside(tmp_path / "npz.json")).names) == 3


@pytest.mark.slow
def test_a_data_set_file_by_two_processes_is_prepared_as_by_one(preparation, tiny_sdxl, tmp_path, run_processes):
    folder = tmp_path / "set" / "images"
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\n"
    config = tmp_path / "sets.toml"
    config.write_text(
        f"[general]\nresolution = 128\n[[datasets]]\n{subset}[[datasets]]\nresolution = 64\n{subset}flip_aug = true\n"
    )
    found = []
    for number in (1, 2):
        argv = [str(tiny_sdxl), f"--dataset_config={config}"]
        runs = run_processes(number, argv, "prepare", **{END_AT_ONCE: "1"})
        assert [run.wait() for run in runs] == [0] * number, [run.said for run in runs]
        assert "6 images (0 had their latents)" in runs[0].said
        found.append({path.name: path.read_bytes() for path in folder.glob("*.npz")})
        for path in folder.glob("*.npz"):
            path.unlink()
    assert found[0] == found[1]
    assert len(found[0]) == 6


@pytest.mark.slow
def test_kills_lose_nothing_and_change_nothing(preparation: Preparation, run_server):
    assert run_server("prepare", preparation.argv("undisturbed"), **{END_AT_ONCE: "1"}).wait() == 0
    kills = 0
    for place in range(2, 16):
        argv = preparation.argv("killed", "--skip_existing")
        run = run_server("prepare", argv, **{KILL_AT: str(place), FOLDER: "killed.json", END_AT_ONCE: "1"})
        kills += run.wait() == -signal.SIGKILL
    assert kills > 3
    run = run_server("prepare", preparation.argv("killed", "--skip_existing"), **{END_AT_ONCE: "1"})
    assert run.wait() == 0
    assert "3 images (3 had their latents)" in run.said
    assert preparation.files("killed") == preparation.files("undisturbed")


def test_a_second_preparation_at_once_is_refused(preparation: Preparation, run_server, tmp_path):
    with run_lock(tmp_path, "same.json", doing="preparing"):
        second = run_server("prepare", preparation.argv("same"), **{END_AT_ONCE: "1"})
        assert second.wait() == 2
    assert f"is preparing same.json in '{tmp_path}'. Wait until it has ended." in second.said


@pytest.mark.slow
def test_training_is_bit_for_bit_the_same_and_resumes_across_a_change(
    prepared_set: PreparedSet, tiny_sdxl: Path, tmp_path: Path, run_server
):
    shutil.copytree(prepared_set.folder, tmp_path / "set")
    made = PreparedSet(tmp_path / "set")

    def train(name: str, *flags: str) -> dict:
        argv = base_flags(tiny_sdxl, made.latents_json, made.images, tmp_path / name)
        argv += ["--output_name=m", "--resolution=128,128", "--seed=7", *BUCKET_FLAGS, "--save_state"]
        argv += ["--max_train_steps=3", f"--learning_rate={RATE}", f"--logging_dir={tmp_path / name / 'logs'}"]
        run = run_server("train", [*argv, *flags], **{END_AT_ONCE: "1"})
        assert run.wait() == 0, run.said
        return {key: value for key, value in outcome_of(tmp_path / name).items() if key != "leftover logs"}

    from_npz = train("npz")
    train("changed", "--max_train_steps=1")
    for path in made.images.glob("*.npz"):
        path.unlink()
    assert differences(from_npz, train("memory", "--cache_latents")) == []
    argv = [made.images, made.captions_json, made.latents_json, tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    run = run_server("prepare", [*map(str, argv), "--latents_as=shards"], **{END_AT_ONCE: "1"})
    assert run.wait() == 0
    assert differences(from_npz, train("shards", "--max_data_loader_n_workers=2")) == []
    assert list(made.images.glob("*.npz")) == []
    changed = train("changed", "--resume=latest")
    assert changed["model m"].keys() == from_npz["model m"].keys()
    assert all(torch.equal(weights, from_npz["model m"][name]) for name, weights in changed["model m"].items())
