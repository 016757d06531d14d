"""What sdxl_train.py reads and writes beside its training set: models, logs, samples, files of options."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train
from demo.random_sdxl import TINY, write_random_sdxl
from library.samples.prompts import read_prompt_file
from library.samples.sampler import SamplingNetworks, draw_picture
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.training.run_record import RECORD_FOLDER
from tests.conftest import PreparedSet

VAE = "first_stage_model."
ONE_STEP = ("--max_train_steps=1",)
NO_CHANGE = "--learning_rate=1e-30"  # lost in rounding


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def models(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD_FOLDER)


# -- models -----------------------------------------------------------------------------------------------------------


def test_models_are_saved_by_steps_and_epochs_and_only_the_last_ones_kept(train, one_picture: str, capsys):
    run = train(
        *(one_picture, "--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=2"),
        *("--save_every_n_steps=1", "--save_last_n_steps=1"),
    )
    assert models(run.output) == [
        *("m-000002.safetensors", "m-000003.safetensors"),
        *("m-step00000003.safetensors", "m-step00000004.safetensors"),
        "m.safetensors",
    ]
    assert same(run.weights("m-000003"), run.weights("m-step00000003"))
    assert same(run.weights("m-step00000004"), run.weights())
    assert not same(run.weights("m-step00000003"), run.weights())
    assert "of an earlier run" not in "".join(capsys.readouterr())
    train(one_picture, *ONE_STEP, "--save_every_n_steps=4", f"--output_dir={run.output}")
    assert "2 models and states of an earlier run" in (said := "".join(capsys.readouterr()))
    assert "'m-step00000004.safetensors', 'm.safetensors'. Another --output_name keeps them" in said


@pytest.mark.parametrize(("given", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_model_is_saved_in_the_precision_asked_for_and_says_what_it_is(
    given: str, dtype, train, one_picture: str, tiny_sdxl: Path
):
    run = train(
        *(one_picture, *ONE_STEP, f"--save_precision={given}", "--metadata_title=Cats, 2nd", "--max_timestep=500"),
    )
    weights = run.weights()
    shapes = {name: weight.shape for name, weight in load_file(tiny_sdxl).items()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert {weight.dtype for weight in weights.values()} == {dtype}
    with safe_open(run.output / "m.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert header["modelspec.title"] == "Cats, 2nd"
    assert header["modelspec.resolution"] == "128x128"
    assert header["modelspec.timestep_range"] == "0,499"


def test_a_diffusers_folder_is_opened_by_diffusers_and_trained_further(train, one_picture: str):
    first = train(one_picture, *ONE_STEP, "--save_model_as=diffusers")
    assert models(first.output) == ["m"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(first.output / "m")
    pipeline.set_progress_bar_config(disable=True)
    [image] = pipeline("photo", prompt_2="a cat", width=64, height=64, num_inference_steps=1).images
    assert image.size == (64, 64)

    start = f"--pretrained_model_name_or_path={first.output / 'm'}"
    second = train(one_picture, *ONE_STEP, start, NO_CHANGE)
    assert models(second.output) == ["m"]  # saved as it came
    assert same(
        pipeline.unet.state_dict(), StableDiffusionXLPipeline.from_pretrained(second.output / "m").unet.state_dict()
    )


def test_a_ckpt_is_read_back_and_trained_further(train, one_picture: str, tiny_sdxl: Path):
    as_ckpt = train(one_picture, *ONE_STEP, "--save_model_as=ckpt").output / "m.ckpt"
    weights = torch.load(as_ckpt, weights_only=True)["state_dict"]
    assert weights.keys() == load_file(tiny_sdxl).keys()
    further = train(one_picture, *ONE_STEP, f"--pretrained_model_name_or_path={as_ckpt}", NO_CHANGE)
    assert same(further.weights(), weights)


def test_another_vae_encodes_and_is_saved_with_the_model(
    train, one_picture: str, prepared_set: PreparedSet, tmp_path: Path, capsys
):
    other = tmp_path / "other vae.safetensors"
    write_random_sdxl(other, TINY, torch.float32, seed=1)
    run = train(one_picture, *ONE_STEP, f"--vae={other}")
    expected = load_file(other)
    weights = run.weights()
    names = [name for name in weights if name.startswith(VAE)]
    assert len(names) == 248
    assert all(torch.equal(weights[name], expected[name]) for name in names)
    said = capsys.readouterr().err
    assert "astronaut.npz' does not fit: it was made with another VAE. It is encoded again." in " ".join(said.split())


# -- logs and samples -------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_course_of_the_run_and_its_samples(train, tmp_path: Path):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text(
        "a cat 颐和园 --e photo --w 64 --h 96 --s 1 --d 3\nno l prompt --w 64 --h 64 --s 1", encoding="utf-8"
    )
    run = train(
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--max_grad_norm=1", "--log_prefix=cats_"),
        "--sample_sampler=k_euler",
    )
    [folder] = run.logs.iterdir()
    assert folder.name.startswith("cats_2")
    events = run.events()
    assert set(events.Tags()["scalars"]) - {"memory/gpu_peak_gib"} == {
        *("loss/current", "loss/average", "loss/epoch", "lr/unet", "steps_per_second", "grad_norm"),
        *("epoch", "images_seen", "images_per_second", "memory/host_gib"),
    }
    losses = run.logged("loss/current")
    assert run.logged("loss/average") == pytest.approx([losses[0], sum(losses[:2]) / 2, sum(losses) / 3])
    assert all(norm > 0 for norm in run.logged("grad_norm"))
    assert [(shown.step, shown.width, shown.height) for shown in events.Images("sample/00")] == [
        (0, 64, 96),
        (2, 64, 96),
    ]
    assert len(events.Images("sample/01")) == 2

    first = sorted((run.output / "sample").glob("m_*_000002_00_3.png"))
    assert len(first) == 1
    with Image.open(first[0]) as image:
        assert image.size == (64, 96)
        assert image.info["prompt_g"] == "a cat 颐和园"
        assert image.info["prompt_l"] == "photo"
        assert image.info["sampler"] == "k_euler"
        assert image.info["model"] == "m"
    text = events.Tensors("sample/00/text/text_summary")[0].tensor_proto.string_val[0].decode("utf-8")
    assert text.startswith("a cat 颐和园")


def test_samples_show_the_model_as_it_came_and_as_it_was_saved(
    train, one_picture: str, tiny_sdxl: Path, tmp_path: Path
):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a cat --e photo --n ugly --w 64 --h 64 --s 1 --d 3 --ss euler_a", encoding="utf-8")
    run = train(one_picture, *ONE_STEP, f"--sample_prompts={prompts}", "--sample_every_n_epochs=1")
    before, after = sorted((run.output / "sample").iterdir(), key=lambda path: path.name[16:])
    assert (before.name[16:], after.name[16:]) == ("_000000_00_3.png", "_e000001_00_3.png")
    [prompt] = read_prompt_file(prompts)
    for path, model in ((before, tiny_sdxl), (after, run.output / "m.safetensors")):
        whole = torch.float32
        read = read_single_file(model, ModelDtypes(whole, whole, whole, whole))
        networks = SamplingNetworks(read.unet, read.vae, read.text_encoder_l, read.text_encoder_g)
        expected = draw_picture(networks, prompt, sampler="euler_a", width=64, height=64, seed=3)
        with Image.open(path) as shown:
            assert expected is not None
            assert shown.tobytes() == expected.tobytes()
    assert before.read_bytes() != after.read_bytes()
    saved = (run.output / "m.safetensors").stat()
    assert saved.st_mtime_ns < after.stat().st_mtime_ns  # whatever happens while it is drawn, the model is there


# -- files of options -------------------------------------------------------------------------------------------------


def test_options_written_to_a_file_make_the_same_run(train, one_picture: str, tmp_path: Path):
    run = train(one_picture, *ONE_STEP, "--noise_offset=0.1", "--save_precision=fp16")
    config = f"--config_file={tmp_path / 'my options'}"  # .toml may be left off
    with pytest.raises(SystemExit) as ending:
        sdxl_train.main([*run.argv, config, "--output_config"])
    assert ending.value.code == 0
    assert "noise_offset = 0.1" in (tmp_path / "my options.toml").read_text(encoding="utf-8")

    assert sdxl_train.main([config, f"--output_dir={tmp_path / 'again'}", "--output_name=other"]) == 0
    assert same(load_file(tmp_path / "again" / "other.safetensors"), run.weights())
