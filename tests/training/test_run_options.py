"""Mistakes in the options of a run: all found and named together, before anything is loaded, with exit status 2."""

from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from library.training.run_options import OPTION_CLASSES, RunOptions
from tests.conftest import base_flags


@pytest.fixture
def refused(tmp_path: Path, capsys, monkeypatch):
    """`refused(*flags)` is what the trainer says of a command that is right but for these flags.

    The model is no model at all, so that a message about anything else shows that it was not yet loaded.
    """
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_text("nothing", encoding="utf-8")
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Path("meta.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")

    def run(*flags: str, leave_out: str = "", loads: bool = False) -> str:
        right = base_flags("model.safetensors", "meta.json", "images", "output")
        argv = [flag for flag in right if flag.partition("=")[0] != leave_out]
        assert sdxl_train.main([*argv, *flags]) == 2
        assert not Path("output").exists()
        said = capsys.readouterr()
        assert ("'model.safetensors' is not a whole safetensors file" in said.err) == loads
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
        return said.err.removeprefix("error: ").rstrip("\n")

    return run


def test_a_command_without_mistakes_goes_on_to_load_the_model(refused):
    assert "'model.safetensors'" in refused(loads=True)


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        (
            "--pretrained_model_name_or_path",
            "--pretrained_model_name_or_path is missing: name the SDXL checkpoint to start from.",
        ),
        ("--output_dir", "--output_dir is missing: name the folder for the models."),
        (
            "--in_json",
            "--in_json is missing: name the metadata file, made with the scripts of finetune/, or sort the images into "
            "folders of --train_data_dir named as 10_name.",
        ),
        ("--train_data_dir", "--train_data_dir is missing: name the folder of the images."),
    ],
)
def test_what_is_missing_is_named(flag: str, problem: str, refused):
    assert refused(leave_out=flag) == problem


def test_one_caption_is_refused_where_captions_are_files(refused):
    assert "--one_caption needs metadata (--in_json)" in refused("--one_caption", leave_out="--in_json")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--pretrained_model_name_or_path=no.safetensors"], "there is no 'no.safetensors'"),
        (["--vae=my set/no vae.safetensors"], "--vae: there is no 'my set/no vae.safetensors'"),
        (["--in_json=my set/no.json"], "--in_json: there is no file 'my set/no.json'"),
        (["--train_data_dir=my images"], "--train_data_dir: there is no folder 'my images'"),
        (["--max_train_steps=-1"], "--max_train_steps is -1; it must be 0 or more."),
        (
            ["--max_train_steps=0"],
            "--max_train_steps is 0: there is nothing to do. Set the number of steps, add --validate_at_first to "
            "measure the model, or --dry_run to look at the training set.",
        ),
        (["--max_train_epochs=-1"], "--max_train_epochs is -1; it must be 1 or more."),
        (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps is 0; it must be 1 or more."),
        (["--train_batch_size=0"], "--train_batch_size is 0; it must be 1 or more."),
        (["--seed=-1"], "--seed is -1; it must be 0 or more."),
        (["--sdpa=maybe"], "--sdpa expects one of True"),
        (["--learning_rate_te1=1e-5"], "--learning_rate_te1 has no effect without --train_text_encoder"),
        (["--learning_rate_te2=0"], "--learning_rate_te2 has no effect without --train_text_encoder"),
        (["--learning_rate=0"], "every learning rate is 0: there is nothing to train."),
        (["--learning_rate=0", "--train_text_encoder"], "every learning rate is 0: there is nothing to train."),
        (["--enable_bucket", "--max_bucket_reso=512"], "Set --max_bucket_reso=2048,"),
        (["--resolution=wide"], "--resolution: 'wide' is not a resolution."),
        (["--full_bf16"], "--full_bf16 needs --mixed_precision=bf16, not no."),
        (["--resolution=1001,1001"], "multiples of 8 pixels"),
        (["--learning_rat=1"], "unknown flag --learning_rat. Did you mean --learning_rate?"),
        (["--clip_skip=2"], "--clip_skip: SDXL was trained on the last block but one"),
        (["--lr_scheduler=cosin"], "Did you mean cosine?"),
        (
            ["--lr_scheduler_type=torch.optim.SGD"],
            "--lr_scheduler_type torch.optim.SGD is not a learning-rate schedule",
        ),
        (["--lr_scheduler=polynomial", "--lr_scheduler_args", "lr_end='low'"], "lr_end is 'low'; it must be a number."),
        (["--lr_scheduler=linear", "--lr_warmup_steps=150%"], "is 2400, but the run has 1600 steps"),
        (["--optimizer_type=Adamw8bits"], "--optimizer_type is 'Adamw8bits'. It must be one of AdamW8bit, "),
        (["--optimizer_type=torch.optim.lr_scheduler.LambdaLR"], "LambdaLR is not an optimizer"),
        (
            ["--offload_optimizer", "--mixed_precision=fp16"],
            "--offload_optimizer cannot work with --mixed_precision=fp16",
        ),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(flags: list[str], problem: str, refused):
    said = refused(*flags)
    assert problem in said
    assert "\n" not in said


@pytest.mark.parametrize("source", ["m-state", "m-state/weights.safetensors"])
def test_a_state_is_no_model(source: str, refused):
    Path("m-state").mkdir()
    Path("m-state/progress.json").write_text("{}", encoding="utf-8")
    Path("m-state/weights.safetensors").touch()
    said = refused(f"--pretrained_model_name_or_path={source}")
    assert f"'{source}' is a saved training state, not a model" in said
    assert "the state with --resume" in said


@pytest.mark.parametrize("flag", ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"])
def test_outputs_of_trained_encoders_are_not_cached(flag: str, refused):
    said = refused(flag, "--train_text_encoder")
    assert said.startswith("--cache_text_encoder_outputs: both text encoders are trained")
    assert "--learning_rate_te1=0" in said


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a cat --steps 20", "there is no option --steps"),
        ("a cat --s many", "--s is 'many'"),
        ("a cat --w 12", "--w is '12'"),
        ("a cat --ss euler_b", "--ss is 'euler_b'"),
        ("--n ugly", "there is no prompt"),
    ],
)
def test_a_mistake_in_the_prompt_file_is_found_before_the_model_is_loaded_and_has_its_line(line, problem, refused):
    Path("my prompts.txt").write_text(f"# samples\na dog --e photo\n{line}\n", encoding="utf-8")
    said = refused("--sample_prompts=my prompts.txt", "--sample_every_n_steps=10")
    assert said.startswith("'my prompts.txt', line 3")
    assert problem in said


def test_all_mistakes_are_named_together(refused):
    said = refused(
        *("--in_json=no.json", "--max_train_steps=-1", "--full_bf16", "--save_last_n_steps=3", "--noise_offset=-1"),
        *("--learning_rate_te1=1e-5", "--sample_every_n_steps=5", "--lr_scheduler=cosin", "--optimizer_type=Adan"),
    )
    first, *problems = said.split("\n")
    assert first == "9 problems with the options:"
    beginnings = [
        *("--in_json", "--max_train_steps", "--full_bf16", "--optimizer_type", "--lr_scheduler", "--noise_offset"),
        *("--save_last_n_steps", "--sample_every_n_steps", "--learning_rate_te1"),
    ]
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.strip().startswith(beginning)


def test_an_error_in_the_options_leaves_a_finished_run_as_it_is(refused, tmp_path: Path):
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "m.safetensors").write_text("a model", encoding="utf-8")
    refused("--output_dir=finished", "--output_name=m", "--max_train_steps=0")
    assert (tmp_path / "finished" / "m.safetensors").read_text(encoding="utf-8") == "a model"


def test_every_class_of_options_has_a_heading_of_its_own():
    headings = [option_class._argument_group_name for option_class in OPTION_CLASSES]
    assert len(set(headings)) == len(headings)
    assert RunOptions in OPTION_CLASSES
