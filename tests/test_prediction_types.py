"""Models that predict velocity or a flow: recognised in every form, trained, saved, loaded and drawn as such."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_gen_img
import sdxl_train
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.diffusers_folder import read_diffusers_folder, write_diffusers_configs
from library.sdxl.model_source import ModelOptions, read_prediction
from library.sdxl.prediction import FLOW, VELOCITY, Prediction
from library.sdxl.prediction_options import AS_THE_MODEL_SAYS
from tests.conftest import Run, base_flags, forget_accelerator

TYPE = "modelspec.prediction_type"
VELOCITY_MODEL = Prediction(VELOCITY, has_zero_terminal_snr=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # within diffusers


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    path.write_text("a dog --e photo --w 64 --h 64 --s 2 --d 3 --gr 0.7", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def velocity_run(train: Callable[..., Run], one_picture: str, prompts: Path, one_thread: None) -> Run:
    """The tiny SDXL converted to velocity by training, and drawn before and after it."""
    flags = ("--v_parameterization", "--zero_terminal_snr", "--max_train_steps=2", "--stratified_timesteps")
    sampling = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--sample_sampler=euler")
    return train(one_picture, *flags, *sampling, "--learning_rate=1e-3")


@pytest.fixture(scope="module")
def velocity_model(velocity_run: Run) -> Path:
    return velocity_run.output / "m.safetensors"


@pytest.fixture(scope="module")
def forms(velocity_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The velocity model as others would hand it on, and whether each says that it has zero terminal SNR."""
    folder = tmp_path_factory.mktemp("forms")
    tensors, header = load_file(velocity_model), header_of(velocity_model)
    unmarked = {name: tensor for name, tensor in tensors.items() if name not in ("v_pred", "ztsnr")}
    silent = {key: value for key, value in header.items() if key != TYPE}
    save_file(tensors, folder / "markers.safetensors", silent)
    save_file(unmarked, folder / "header.safetensors", header)
    write_diffusers_configs(folder / "scheduler", read_single_file(velocity_model, ModelDtypes()))
    return {
        "markers": folder / "markers.safetensors",
        "header": folder / "header.safetensors",
        "both": velocity_model,
        "scheduler": folder / "scheduler",
    }


def test_a_converted_model_says_so_in_every_place(velocity_model: Path):
    assert header_of(velocity_model)[TYPE] == "v"
    markers = {name: tensor for name, tensor in load_file(velocity_model).items() if name in ("v_pred", "ztsnr")}
    assert {name: tensor.numel() for name, tensor in markers.items()} == {"v_pred": 0, "ztsnr": 0}


@pytest.mark.parametrize("form", ["markers", "header", "both", "scheduler"])
def test_the_velocity_model_is_recognised_in_its_four_forms(form: str, forms: dict[str, Path], caplog):
    caplog.set_level("INFO")
    found = read_prediction(ModelOptions(str(forms[form])), AS_THE_MODEL_SAYS)
    assert found == replace(VELOCITY_MODEL, has_zero_terminal_snr=form != "header")  # a header has no word for it
    place = {"markers": "the tensor 'v_pred'", "header": TYPE, "both": "'v_pred'", "scheduler": "prediction_type"}[form]
    assert "the model predicts velocity (v)" in caplog.text
    assert place in caplog.text


def test_the_folder_of_a_velocity_model_draws_with_rescaled_betas_from_the_last_timestep(forms: dict[str, Path]):
    config = EulerDiscreteScheduler.from_pretrained(forms["scheduler"] / "scheduler").config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"


def test_a_velocity_model_is_trained_on_and_saved_as_such_without_a_flag(
    train: Callable[..., Run], one_picture: str, forms: dict[str, Path]
):
    model = f"--pretrained_model_name_or_path={forms['markers']}"
    run = train(one_picture, model, "--max_train_steps=1", "--learning_rate=0.01", "--save_model_as=diffusers")
    assert read_diffusers_folder(str(run.output / "m"), ModelDtypes()).prediction == VELOCITY_MODEL


def test_a_velocity_model_is_drawn_bit_for_bit_as_in_its_run_with_rescaled_guidance(
    velocity_run: Run, velocity_model: Path, tmp_path: Path
):
    prompt = "a dog --e photo --w 64 --h 64 --s 2 --d 3 --gr 0.7 --ss euler"
    argv = [f"--ckpt={velocity_model}", f"--prompt={prompt}", f"--outdir={tmp_path}"]
    forget_accelerator()
    assert sdxl_gen_img.main(argv) == 0
    [drawn] = tmp_path.glob("*.png")
    first, last = sorted((velocity_run.output / "sample").glob("*.png"), key=lambda path: "_000002_" in path.name)
    with Image.open(drawn) as after, Image.open(first) as before, Image.open(last) as sample:
        assert "Guidance rescale: 0.7" in sample.text["parameters"]
        kinds = {node["class_type"] for node in json.loads(sample.text["prompt"]).values()}
        assert {"ModelSamplingDiscrete", "RescaleCFG"} <= kinds
        assert after.tobytes() == sample.tobytes() != before.tobytes()
    with_less = [each.replace("--gr 0.7", "--gr 0") for each in argv]
    forget_accelerator()
    assert sdxl_gen_img.main(with_less) == 0
    first_drawn, second_drawn = sorted(tmp_path.glob("*.png"))
    assert first_drawn.read_bytes() != second_drawn.read_bytes()


@pytest.fixture(scope="module")
def flow_run(train: Callable[..., Run], one_picture: str, prompts: Path, one_thread: None) -> Run:
    """The tiny SDXL converted to a rectified flow, whose images are drawn with a shift."""
    flags = (
        "--flow_matching",
        "--flow_shift=2.5",
        "--max_train_steps=2",
        "--timestep_sampling=shift",
        "--loss_weighting=edm2",
    )
    sampling = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--sample_sampler=heun")
    return train(one_picture, *flags, *sampling, "--learning_rate=1e-3", "--save_state_on_train_end")


def test_a_flow_is_trained_saved_loaded_and_drawn(flow_run: Run, tmp_path: Path):
    model = flow_run.output / "m.safetensors"
    assert header_of(model)[TYPE] == "flow"
    read = read_single_file(model, ModelDtypes())
    assert read.prediction == Prediction(FLOW, flow_shift=2.5)
    assert (flow_run.output / "m-state" / "loss_weights.pt").is_file()
    with Image.open(next((flow_run.output / "sample").glob("*.png"))) as image:
        assert image.size == (64, 64)
        workflow = json.loads(image.text["prompt"]).values()
        assert [node["inputs"]["shift"] for node in workflow if node["class_type"] == "ModelSamplingSD3"] == [2.5]
    write_diffusers_configs(tmp_path / "folder", read)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "folder" / "scheduler")
    assert (scheduler.config.prediction_type, scheduler.config.use_flow_sigmas) == ("flow_prediction", True)
    found = read_prediction(ModelOptions(str(tmp_path / "folder")), AS_THE_MODEL_SAYS)
    assert found == Prediction(FLOW, flow_shift=2.5)
    assert DiffusionPipeline.load_config(tmp_path / "folder")["scheduler"][1] == "DPMSolverMultistepScheduler"


def test_a_flow_is_drawn_with_the_shift_of_its_run_unless_another_is_asked_for(flow_run: Run, tmp_path: Path):
    [sampled] = (flow_run.output / "sample").glob("*_000002_*.png")
    prompt = "a dog --e photo --w 64 --h 64 --s 2 --d 3 --gr 0.7 --ss heun"
    images = []
    for flags in ([], ["--flow_shift=1"]):
        forget_accelerator()
        argv = [f"--ckpt={flow_run.output / 'm.safetensors'}", f"--prompt={prompt}", f"--outdir={tmp_path}", *flags]
        assert sdxl_gen_img.main(argv) == 0
        images.append(max(tmp_path.glob("*.png"), key=lambda path: path.stat().st_mtime_ns))
    with Image.open(images[0]) as same, Image.open(images[1]) as other, Image.open(sampled) as sample:
        assert same.tobytes() == sample.tobytes() != other.tobytes()


# -- refused, before the model is loaded ------------------------------------------------------------------------------


@pytest.fixture
def refused(tiny_sdxl: Path, prompts: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """`refused(kind, *flags)` is the one line that the trainer says of a model that says `kind` in its header."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Path("meta.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")
    shutil.copy(prompts, "prompt.txt")

    def run(kind: str, *flags: str) -> str:
        save_file({"a": torch.ones(1)}, "model.safetensors", {TYPE: kind})
        assert sdxl_train.main([*base_flags("model.safetensors", "meta.json", "images", "output"), *flags]) == 2
        said = capsys.readouterr()
        assert "loading" not in said.out
        [line] = [line for line in said.err.splitlines() if not line.startswith("warning")]
        return line

    return run


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (
            "epsilon",
            ["--v_parameterization"],
            "'model.safetensors' predicts noise (epsilon): modelspec.prediction_type",
        ),
        ("v", ["--flow_matching"], "--convert_prediction moves it to a flow"),
        ("flow", ["--zero_terminal_snr"], "--zero_terminal_snr rescales betas, and 'model.safetensors' is a flow"),
        ("epsilon", ["--flow_matching", "--zero_terminal_snr"], "--zero_terminal_snr rescales betas, and a flow has"),
        ("flow", ["--min_snr_gamma=5"], "--min_snr_gamma weighs by the signal-to-noise ratio of diffusion models"),
        ("epsilon", ["--scale_v_pred_loss_like_noise_pred"], "is for models that predict velocity"),
        ("v", ["--v_pred_like_loss=0.1"], "is for models that predict noise"),
        ("v", ["--min_snr_gamma=-1"], "--min_snr_gamma is -1"),
        (
            "flow",
            ["--sample_prompts=prompt.txt", "--sample_at_first", "--sample_sampler=euler_a"],
            "which euler_a cannot draw; choose from ddim, euler, heun, dpmsolver++, dpmsingle",
        ),
    ],
)
def test_each_wrong_combination_is_refused_in_one_line(kind: str, flags: list[str], expected: str, refused):
    assert expected in refused(kind, *flags)


def test_a_flag_that_contradicts_another_needs_no_model(refused):
    said = refused("v", "--flow_matching", "--debiased_estimation_loss")
    assert "--debiased_estimation_loss weighs by the signal-to-noise ratio" in said
