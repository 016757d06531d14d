"""Captions per encoder in whole runs: resumed and killed runs make the same texts, and encoders freeze on request."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import sdxl_train
from tests.conftest import BUCKET_FLAGS, RATE, PreparedSet, Run, forget_accelerator
from tests.outcome import differences, outcome_of

EVERYTHING = (
    *("--enable_wildcard", "--shuffle_caption_l", "--keep_tokens_l=1", "--caption_tag_dropout_rate_l=0.3"),
    *("--token_warmup_step_l=6", "--weighted_captions_l", "--caption_dropout_rate=0.2", "--caption_dropout_rate_l=0.2"),
    *("--caption_dropout_every_n_epochs_g=2", "--dropped_caption_g=zeros", "--caption_prefix_g=photograph of"),
    *("--max_token_length_g=150", "--flip_aug", "--cache_latents", "--dataset_repeats=2", "--train_batch_size=2"),
)


@pytest.fixture
def varied_set(prepared_set: PreparedSet, tmp_path: Path) -> list[str]:
    """The flags of a set whose captions have lines, wildcards, tags and weights."""
    entries = json.loads(prepared_set.captions_json.read_text(encoding="utf-8"))
    for number, entry in enumerate(entries.values()):
        entry["captionL"] = [f"tag {number}, {{red|blue}}, (bright:1.2), dusk, grain", "photograph, night, soft"]
        entry["captionG"] = f"{entry['captionG']} in {{summer|winter}}.\nAnother sentence, with a comma."
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    fresh = prepared_set.without_latents(tmp_path / "set")
    return [f"--in_json={path}", f"--train_data_dir={fresh.images}", "--enable_bucket"]


def assert_equal(one: Run, other: Run) -> None:
    expected = other.weights()
    assert all(torch.equal(weight, expected[name]) for name, weight in one.weights().items())


def test_a_resumed_run_makes_the_texts_of_the_run_that_went_on(train, varied_set: list[str]):
    flags = [*varied_set, *EVERYTHING, "--save_every_n_steps=3", "--save_state"]
    whole = train(*flags, "--max_train_steps=5")
    forget_accelerator()
    state = whole.output / "m-step00000003-state"
    resumed = train(*flags, "--max_train_steps=5", f"--resume={state}")
    assert_equal(resumed, whole)
    assert resumed.logged("loss/current") == whole.logged("loss/current")[3:]
    plain = train(*varied_set, "--cache_latents", "--dataset_repeats=2", "--train_batch_size=2", "--max_train_steps=1")
    assert plain.logged("loss/current") != whole.logged("loss/current")[:1]


@pytest.fixture
def data_set_file(varied_set: list[str], tmp_path: Path) -> Path:
    """A file of three subsets in two data sets, with metadata and without, each with rules of its own."""
    metadata, folder, _ = (flag.partition("=")[2] for flag in varied_set)
    (tmp_path / "others").mkdir()
    for number in range(2):
        image = tmp_path / "others" / f"{number}.png"
        Image.effect_noise((120 + number, 140), 90).convert("RGB").save(image)
        image.with_suffix(".txt").write_text(f"noise {number}, grey, grain, soft\ndots, dark, coarse", encoding="utf-8")
        image.with_suffix(".caption").write_text(f"a {{field|wall}} of dots, number {number}", encoding="utf-8")
    path = tmp_path / "sets.toml"
    path.write_text(
        f"""
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = '{metadata}'
        image_dir = '{folder}'
        [[datasets.subsets]]
        image_dir = '{tmp_path / "others"}'
        is_reg = true
        caption_tag_dropout_rate_l = 0.6
        token_warmup_step_l = 0.5
        [[datasets]]
        resolution = 64
        batch_size = 1
        [[datasets.subsets]]
        image_dir = '{tmp_path / "others"}'
        shuffle_caption_l = false
        caption_dropout_rate_g = 0.3
        random_crop = true
        """,
        encoding="utf-8",
    )
    return path


@pytest.mark.slow  # three runs in processes; test_a_resumed_run_makes_the_texts_of_the_run_that_went_on resumes in one
def test_a_killed_run_ends_as_one_that_was_left_alone(run_server, data_set_file: Path, tiny_sdxl: Path, tmp_path: Path):
    def argv(folder: Path) -> list[str]:
        files = (f"--pretrained_model_name_or_path={tiny_sdxl}", f"--dataset_config={data_set_file}")
        base = (f"--output_dir={folder}", "--output_name=m", "--resolution=128,128", "--enable_bucket", "--seed=7")
        rate = ("--optimizer_type=torch.optim.SGD", f"--learning_rate={RATE}", "--cache_text_encoder_outputs")
        saved = ("--max_train_steps=5", "--save_every_n_steps=2", "--save_state", "--prior_loss_weight=0.5")
        return [*files, *base, *rate, *saved, *BUCKET_FLAGS, *EVERYTHING]

    whole = run_server("train", argv(tmp_path / "whole"))
    assert whole.wait() == 0
    killed = run_server("train", argv(tmp_path / "killed"))
    killed.wait_until_said("3/5")
    killed.send(signal.SIGKILL, to_group=True)
    assert killed.wait() == -signal.SIGKILL
    again = run_server("train", [*argv(tmp_path / "killed"), "--resume=latest"])
    assert again.wait() == 0, again.said
    assert differences(outcome_of(tmp_path / "whole"), outcome_of(tmp_path / "killed")) == []


@pytest.mark.slow  # several runs
def test_another_rule_of_captions_is_another_run_and_another_spelling_of_it_is_not(
    train, varied_set: list[str], capsys
):
    flags = [*varied_set, "--enable_wildcard", "--shuffle_caption_l", "--save_every_n_steps=1", "--save_state"]
    run = train(*flags, "--max_train_steps=1")
    resume = f"--resume={run.output / 'm-step00000001-state'}"
    same = ["--shuffle_caption", "--shuffle_caption_g=false", "--shuffle_caption_l=true"]
    train(*flags, *same, "--max_train_steps=2", resume)
    capsys.readouterr()
    forget_accelerator()
    argv = [*run.argv, "--caption_tag_dropout_rate_l=0.5", "--max_train_steps=2", resume]
    assert sdxl_train.main(argv) == 2
    assert "--caption_tag_dropout_rate_l: 0.0 then, 0.5 now" in capsys.readouterr().err


@pytest.mark.slow  # four runs
@pytest.mark.parametrize("stepping", [[], ["--fused_backward_pass", "--optimizer_type=torch.optim.SGD"]], ids=str)
def test_an_encoder_that_stops_is_frozen_from_there_on_and_the_rest_trains(stepping, train, tiny_sdxl: Path):
    flags = ("--train_text_encoder", *stepping)
    one = train(*flags, "--max_train_steps=1")
    stopped = train(*flags, "--max_train_steps=3", "--stop_training_te1=1")
    weights, after_one = stopped.weights(), one.weights()
    of_l = [name for name in weights if name.startswith("conditioner.embedders.0.")]
    of_g = [name for name in weights if name.startswith("conditioner.embedders.1.")]
    assert all(torch.equal(weights[name], after_one[name]) for name in of_l)
    assert any(not torch.equal(weights[name], after_one[name]) for name in of_g)
    assert stopped.logged("lr/text_encoder_l")[1:] == [0, 0]


@pytest.mark.slow  # several runs
def test_a_fraction_is_one_of_all_steps_and_a_resumed_run_stays_frozen(train):
    flags = ("--train_text_encoder", "--stop_training_te2=0.5", "--save_every_n_steps=3", "--save_state")
    whole = train(*flags, "--max_train_steps=4")
    resumed = train(*flags, "--max_train_steps=4", f"--resume={whole.output / 'm-step00000003-state'}")
    assert_equal(resumed, whole)
    assert [rate > 0 for rate in whole.logged("lr/text_encoder_g")] == [True, True, False, False]
