"""Presets and option files of the kinds that people publish, with names and values of our own, are read.

In `published/`: four files that the settings window (GUI) of kohya's family saves, from 2023 to 2024, and TOML files of
other hands. What they ask for and this trainer does not offer is named with its reason, and nothing else is.
"""

from pathlib import Path

import pytest

from library.config.errors import UserError
from library.config.kohya_flags import OTHER_TRAINERS, TRAINER_REFUSED
from tests.config.test_neutral_values import in_folder, parsed  # noqa: F401 (a fixture)

PUBLISHED = Path(__file__).parent / "published"
# File to what it asks for beyond an ordinary run; a key that is no longer refused is simply read.
FILES: dict[str, set[str]] = {
    "gui_paged_adamw8bit.json": set(),
    "gui_both_encoders.json": set(),
    "gui_adafactor_2023.json": {"shuffle_caption", "keep_tokens", "caption_dropout_rate"},
    "gui_lion_2024.json": set(),
    "sections_adafactor.toml": set(),
    "settings_window.toml": set(),
    "all_defaults.toml": set(),
    "numbers_in_quotes.toml": set(),
    "prodigy.toml": set(),
    "lora_leftovers.toml": {
        *("network_module", "network_dim", "network_alpha", "network_args", "unet_lr", "text_encoder_lr"),
        "scale_weight_norms",
    },
    "sections_v_prediction.toml": set(),
    "min_snr_full_bf16.toml": {
        *("shuffle_caption", "keep_tokens", "caption_tag_dropout_rate"),
    },
}
ALWAYS_REFUSED = {f[2:] for f in OTHER_TRAINERS}


def test_four_presets_and_eight_files_of_options_are_there():
    assert {path.name for path in PUBLISHED.iterdir()} == set(FILES)
    assert sum(name.endswith(".json") for name in FILES) == 4
    assert sum(name.endswith(".toml") for name in FILES) == 8


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_and_all_that_is_refused_in_it_is_named(name: str, in_folder, capsys):  # noqa: F811
    argv = [f"--config_file={PUBLISHED / name}", *in_folder, "--mixed_precision=bf16"]  # one asks for fp16, on a GPU
    refused = {key for key in FILES[name] if f"--{key}" in TRAINER_REFUSED}
    if not refused:
        parsed(*argv)
        assert capsys.readouterr() == ("", "")
        return
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    said = str(caught.value)
    assert "unknown" not in said and "expects" not in said
    named = {word.strip(":,") for line in said.splitlines() for word in line.partition("': ")[2].split(": ")[0].split()}
    assert named - {"and", "more"} == refused
    assert len(refused & ALWAYS_REFUSED) in (0, len(refused))


def options_of_file(name: str, flags: list[str]):
    return parsed(f"--config_file={PUBLISHED / name}", *flags)


def test_a_preset_of_the_window_becomes_the_run_that_the_window_would_start(in_folder):  # noqa: F811
    run = options_of_file("gui_paged_adamw8bit.json", in_folder)
    assert (run.optimizer.optimizer_type, run.optimizer.learning_rate) == ("PagedAdamW8bit", 3e-5)
    assert (run.run.max_train_epochs, run.run.gradient_accumulation_steps, run.run.seed) == (60, 4, 77)
    assert (run.noise.noise_offset, run.noise.adaptive_noise_scale) == (0.04, 0.004)
    assert (run.timesteps.min_timestep, run.timesteps.max_timestep) == (50, 950)
    assert (run.training_set.cache_text_encoder_outputs, run.model.no_half_vae) == (True, True)
    assert (run.training_set.vae_batch_size, run.save.save_every_n_epochs, run.save.save_every_n_steps) == (1, 30, None)


def test_the_windows_folders_epochs_and_warm_up_are_those_of_the_trainer(in_folder):  # noqa: F811
    Path("prepared").mkdir()
    Path("prepared/meta_lat.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")
    run = options_of_file("gui_lion_2024.json", ["--pretrained_model_name_or_path=model.safetensors"])
    assert (run.training_set.in_json, run.training_set.train_data_dir) == (
        Path("prepared/meta_lat.json"),
        Path("images"),
    )
    assert (run.training_set.enable_bucket, run.run.max_train_epochs, run.run.seed) == (True, 4, None)
    assert (run.schedule.lr_scheduler, run.schedule.lr_warmup_steps) == ("cosine", 0.05)
    assert run.optimizer.optimizer_args == ["weight_decay=0.02", "betas=(0.9,0.98)"]
    assert (run.optimizer.fused_backward_pass, run.optimizer.learning_rate_te1) == (True, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"additional_parameters": "--lr_scheduler_type x"}', "belongs to the command line. Pass it there"),
        ('{"sample_prompts": "a cat --w 512\\na dog"}', "sample_prompts holds the prompts themselves. Save them"),
        ('{"lr_warmup": "much", "lr_scheduler": "cosine"}', "lr_warmup is 'much'. It must be a percentage"),
        ('{"lr_warmup": 100, "lr_scheduler": "cosine"}', "lr_warmup is 100. It must be a percentage"),
        ('{"LoRA_type": "LyCORIS/LoKr"}', "LoRA_type: belongs to LoRA training"),
        ('{"learning_rte": 1}', "unknown key 'learning_rte'. Did you mean learning_rate?"),
        ('{"learning_rate": {"a": 1}}', "--learning_rate expects a number, not {'a': 1}"),
        ("[1]", "is not a JSON object of settings"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON: maximum recursion depth"),
        ('{"seed": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
    ],
    ids=lambda text: text[:40],
)
def test_a_mistake_in_a_preset_is_named(text: str, problem: str, in_folder):  # noqa: F811
    Path("preset.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parsed("--config_file=preset.json", *in_folder)
    assert problem in str(caught.value)


def test_a_heading_without_a_value_is_no_key(in_folder):  # noqa: F811
    Path("preset.json").write_text('{"===== Model =====": null, "seed": 3}', encoding="utf-8")
    assert parsed("--config_file=preset.json", *in_folder).run.seed == 3


def test_the_options_are_not_written_as_json(in_folder):  # noqa: F811
    with pytest.raises(UserError, match="--output_config writes TOML"):
        parsed("--config_file=new.json", "--output_config", *in_folder)
    assert not Path("new.json").exists()
