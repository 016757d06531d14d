"""The workflow of README.md, its commands as they stand there, run as a user runs them; every output file is read."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from diffusers import StableDiffusionXLPipeline
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.diffusers_folder import write_diffusers_folder

ROOT = Path(__file__).parents[1]
CAPTIONS = {  # G, L
    "astronaut": ("a woman in a space suit, smiling", "official portrait, studio light"),
    "chelsea": ("a cat looks to the left, 茶トラ", "close-up"),
    "rocket": ("a rocket on its pad at dusk", "press photograph"),
}
PROMPTS = """# two pictures
woman, portrait, in nature --e photographic --n low quality --w 64 --h 64 --d 42 --l 7 --s 2

猫 --w 64 --h 128 --s 2 --nl blurred
"""


def commands() -> list[str]:
    """The commands of the README's fenced block that begins with the first merge script."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if block.startswith("python finetune/sdxl_merge_captions_g_to_metadata.py")]
    return block.splitlines()


@dataclass(frozen=True)
class Scale:
    """How large a workflow is: what is changed in the commands, and the buckets that come of it, width and height."""

    num_steps: int
    steps_between_samples: int
    changes: dict[str, str]
    buckets: dict[str, list[int]]


AS_WRITTEN = Scale(500, 10, {}, {"astronaut": [1024, 1024], "chelsea": [1216, 832], "rocket": [1216, 832]})
SHORT = replace(AS_WRITTEN, num_steps=10, changes={'--max_train_steps="500"': '--max_train_steps="10"'})
SHORTEST = {
    '--max_train_steps="500"': '--max_train_steps="2"',
    '--sample_every_n_steps="10"': '--sample_every_n_steps="1"',
}
SHORTEST_AND_SMALL = Scale(
    2,
    1,
    SHORTEST | {"1024,1024": "256,256", "=1024": "=256", "=2048": "=512"},
    {"astronaut": [256, 256], "chelsea": [320, 192], "rocket": [320, 192]},
)


FINISHED = "finished"
"""An empty file in the folder of a workflow that came to its end."""


@dataclass(frozen=True)
class Workflow:
    """A finished workflow: the folder that holds "my set", and its scale."""

    folder: Path
    scale: Scale

    @property
    def my_set(self) -> Path:
        return self.folder / "my set"


def set_up(folder: Path, tiny_sdxl: Path) -> None:
    """Copy the scripts into `folder` and make "my set" beside them."""
    for name in ("library", "finetune"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "sdxl_train.py", folder)
    images = folder / "my set" / "images"
    images.mkdir(parents=True)
    for name, (caption_g, caption_l) in CAPTIONS.items():
        Image.fromarray(getattr(skimage.data, name)()).save(images / f"{name}.jpg", quality=90)
        (images / f"{name}.caption").write_text(caption_g + "\n", encoding="utf-8")
        (images / f"{name}.txt").write_text(caption_l, encoding="utf-8")
    (folder / "my set" / "prompt.txt").write_text(PROMPTS, encoding="utf-8")
    shutil.copy(tiny_sdxl, folder / "my set" / "sd_xl_base_1.0.safetensors")


def run_as_typed(command: str, folder: Path) -> None:
    """Run a line as it stands, quotes and all, with the programs of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Four threads on two cores that others use as well would wait for each other in busy loops: ten times as long.
    environment = {**os.environ, "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SHORTEST_AND_SMALL, id="2 steps at 256x256"),
        pytest.param(SHORT, id="10 steps", marks=pytest.mark.slow),  # a minute on 2 cores
        pytest.param(AS_WRITTEN, id="as written", marks=pytest.mark.slow),  # half an hour on 2 cores
    ],
)
def workflow(request: pytest.FixtureRequest, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """The four commands, run one after the other; once, though the processes of a parallel run share these tests."""
    is_parallel = "PYTEST_XDIST_WORKER" in os.environ
    temporary = tmp_path_factory.getbasetemp()
    scale = request.param
    name = f"work folder, {scale.num_steps} steps at {scale.buckets['astronaut'][0]}"
    folder = (temporary.parent if is_parallel else temporary) / name
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / FINISHED).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            set_up(folder, tiny_sdxl)
            for command in commands():
                for written, instead in scale.changes.items():
                    command = command.replace(written, instead)
                run_as_typed(command, folder)
            (folder / FINISHED).touch()
    return Workflow(folder, scale)


def test_there_are_four_commands():
    assert [re.search(r"(\w+)\.py", command)[1] for command in commands()] == [
        "sdxl_merge_captions_g_to_metadata",
        "sdxl_merge_captions_l_to_metadata",
        "prepare_buckets_latents",
        "sdxl_train",
    ]


def test_metadata_holds_both_captions_and_then_the_bucket(workflow: Workflow):
    captions = json.loads((workflow.my_set / "meta_cap.json").read_text(encoding="utf-8"))
    assert {key: (entry["captionG"], entry["captionL"]) for key, entry in captions.items()} == CAPTIONS
    prepared = json.loads((workflow.my_set / "meta_lat.json").read_text(encoding="utf-8"))
    assert prepared == {
        name: {**entry, "train_resolution": workflow.scale.buckets[name]} for name, entry in captions.items()
    }


def test_latents_lie_beside_their_pictures(workflow: Workflow):
    for name, (width, height) in workflow.scale.buckets.items():
        picture = workflow.my_set / "images" / f"{name}.jpg"
        with np.load(picture.with_suffix(".npz")) as file, Image.open(picture) as image:
            assert file["latents"].shape == (4, height // 8, width // 8)
            assert file["latents"].dtype == np.float32
            assert np.isfinite(file["latents"]).all()
            assert file["original_size"].tolist() == list(image.size)
            left, top, right, bottom = file["crop_ltrb"]
            assert (right - left, bottom - top) == (width, height)


def test_samples_are_drawn_before_the_first_step_and_after_those_asked_for(workflow: Workflow):
    names = [path.name for path in (workflow.my_set / "output" / "sample").iterdir()]
    steps = range(0, workflow.scale.num_steps + 1, workflow.scale.steps_between_samples)
    assert sorted(re.sub(r"_\d{14}_", "_", name) for name in names) == [
        f"finetuned_model_{step:06d}_{picture}.png" for step in steps for picture in ("00_42", "01")
    ]
    for path in (workflow.my_set / "output" / "sample").iterdir():
        with Image.open(path) as image:
            is_first = path.name.endswith("_42.png")
            assert image.size == ((64, 64) if is_first else (64, 128))
            assert image.info["sampler"] == "euler_a"
            assert image.info["prompt_g"] == ("woman, portrait, in nature" if is_first else "猫")
            assert image.info["prompt_l"] == ("photographic" if is_first else "猫")
            assert image.info["negative_prompt_l"] == ("low quality" if is_first else "blurred")
            assert image.info["parameters"].startswith(image.info["prompt_g"])


def test_tensorboard_reads_the_logs(workflow: Workflow):
    [folder] = (workflow.my_set / "logs").iterdir()
    events = EventAccumulator(str(folder / "finetuning"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert set(events.Tags()["scalars"]) - {"memory/gpu_peak_gib"} == {
        *("loss/current", "loss/average", "loss/epoch", "lr/unet", "steps_per_second"),
        *("epoch", "images_seen", "images_per_second", "memory/host_gib"),
    }
    losses = [event.value for event in events.Scalars("loss/current")]
    assert len(losses) == workflow.scale.num_steps
    assert np.isfinite(losses).all()
    assert {round(event.value, 9) for event in events.Scalars("lr/unet")} == {1e-5}
    assert len(events.Images("sample/00")) == workflow.scale.num_steps // workflow.scale.steps_between_samples + 1


def test_the_checkpoint_has_the_names_and_shapes_of_the_base_model(workflow: Workflow, tiny_sdxl: Path):
    path = workflow.my_set / "output" / "finetuned_model.safetensors"
    before, after = load_file(tiny_sdxl), load_file(path)
    assert {name: weight.shape for name, weight in after.items()} == {
        name: weight.shape for name, weight in before.items() if not name.endswith("position_ids")
    }
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    moved = {name.split(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name].bfloat16())}
    assert moved == {"model"}  # the U-Net; not first_stage_model, not conditioner
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.title"] == "finetuned_model"
        assert file.metadata()["modelspec.resolution"] == "{}x{}".format(*workflow.scale.buckets["astronaut"])
    assert [entry.name for entry in sorted((workflow.my_set / "output").iterdir())] == [path.name, "run", "sample"]


def test_diffusers_draws_with_the_checkpoint(workflow: Workflow, tmp_path: Path):
    # from_single_file knows the true SDXL's widths alone, so the tiny one goes through a diffusers folder; that the
    # true layout is opened directly is a figure of benchmarks/.
    model = read_single_file(workflow.my_set / "output" / "finetuned_model.safetensors", ModelDtypes())
    write_diffusers_folder(tmp_path / "model", model, torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    [image] = pipeline("photographic", prompt_2="a cat", width=64, height=64, num_inference_steps=1).images
    assert image.size == (64, 64)
