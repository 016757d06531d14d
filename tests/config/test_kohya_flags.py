"""Every flag of the reference is an option, another spelling of one, or refused with a reason: nothing is left over."""

import importlib
import json
from pathlib import Path

import pytest

from library.captions.options import CaptionOptions
from library.config.kohya_flags import (
    OTHER_TRAINERS,
    PREPARE_REFUSED,
    PREPARE_REPLACED,
    TRAINER_REFUSED,
    TRAINER_REPLACED,
)
from library.config.options import options_of
from library.optim.ema_options import EmaOptions

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "cli_flags.json").read_text(encoding="utf-8"))

# script, its name in the golden file, replaced, refused, and the flags that only this project has
OF_ONE_ENCODER = {option.flag for option in options_of(CaptionOptions) if option.flag.endswith(("_l", "_g"))}

SCRIPTS = [
    (
        "sdxl_train",
        "sdxl_train_2026",
        TRAINER_REPLACED,
        TRAINER_REFUSED,
        {
            *OF_ONE_ENCODER,
            *(option.flag for option in options_of(EmaOptions)),
            "--sample_ema",
            "--bf16_rounding",
            "--cache_text_encoder_outputs_g",
            "--cache_text_encoder_outputs_l",
            "--caption_draws",
            "--check_latents",
            "--caption_variants",
            "--convert_prediction",
            "--discrete_flow_shift",
            "--edm2_channels",
            "--edm2_learning_rate",
            "--flow_shift",
            "--logit_mean",
            "--logit_std",
            "--loss_weighting",
            "--sample_guidance_rescale",
            "--sigmoid_scale",
            "--stratified_timesteps",
            "--timestep_sampling",
            "--flow_matching",
            "--noise_prediction",
            "--cuda_graphs",
            "--deterministic",
            "--dropped_caption",
            "--dry_run",
            "--dry_run_report",
            "--stop_training_te1",
            "--stop_training_te2",
            "--protected_tags",
            "--legacy_crop_coords",
            "--legacy_text_projection",
            "--max_bad_steps",
            "--offload_optimizer",
            "--one_caption",
            "--plot_schedule",
            "--resume_anyway",
            "--sample_grid",
            "--save_every_n_minutes",
            "--prior_loss_weight",
            "--update_captions",
            "--validation_split",
            "--validation_seed",
            "--validate_every_n_steps",
            "--validate_every_n_epochs",
            "--validate_at_first",
            "--max_validation_steps",
            "--validation_timesteps",
            "--validation_ablation",
            "--transposed_text_projection",
        },
    ),
    (
        "finetune.prepare_buckets_latents",
        "prepare_buckets_latents",
        PREPARE_REPLACED,
        PREPARE_REFUSED,
        {
            *(
                "--alpha_mask",
                "--conditioning_data_dir",
                "--latents_as",
                "--latents_dtype",
                "--legacy_crop_coords",
                "--remove_missing",
            ),
            "--resize_interpolation",
        },
    ),
    (
        "finetune.sdxl_merge_captions_g_to_metadata",
        "sdxl_merge_captions_g_to_metadata",
        {},
        {},
        {"--allow_missing", "--caption_extention", "--remove_missing"},
    ),
    (
        "finetune.sdxl_merge_captions_l_to_metadata",
        "sdxl_merge_captions_l_to_metadata",
        {},
        {},
        {"--allow_missing", "--remove_missing"},
    ),
]
SCRIPT_NAMES = [name for name, *_ in SCRIPTS]

# Defaults that differ from the reference's on purpose, with the reason.
OTHER_DEFAULTS: dict[tuple[str, str], str] = {
    ("sdxl_train", "--resolution"): "SDXL's own size, where the reference has none and fails later",
    ("sdxl_train", "--ddp_gradient_as_bucket_view"): "it saves the memory of all gradients and changes no result",
    ("sdxl_train", "--sdpa"): "no other attention is offered, so that it is always on",
    ("sdxl_train", "--caption_separator"): "unsaid, so that a farther level may say it; the comma of the rules",
    ("sdxl_train", "--caption_extension"): "unsaid: L and G have a file each",
    ("sdxl_train", "--token_warmup_min"): "unsaid, so that a farther level may say it; the 1 of the rules",
    ("sdxl_train", "--console_log_simple"): "messages stand alone unless time and level are asked for",
}


def options_by_flag(script):
    options = [each for cls in importlib.import_module(script).OPTION_CLASSES for each in options_of(cls)]
    return {flag: each for each in options for flag in (each.flag, *each.aliases)}


@pytest.mark.parametrize(("script", "golden", "replaced", "refused", "ours"), SCRIPTS, ids=SCRIPT_NAMES)
def test_the_flags_are_those_of_the_reference_and_the_named_ones_of_ours(script, golden, replaced, refused, ours):
    offered = set(options_by_flag(script))
    assert offered | set(replaced) | (set(refused) - set(OTHER_TRAINERS)) == set(REFERENCE[golden]) | ours
    assert not offered & (set(replaced) | set(refused))


@pytest.mark.parametrize(("script", "golden"), [(name, golden) for name, golden, *_ in SCRIPTS], ids=SCRIPT_NAMES)
def test_defaults_are_those_of_the_reference_unless_named(script, golden):
    different = {
        (script, flag)
        for flag, option in options_by_flag(script).items()
        if flag == option.flag
        and flag in REFERENCE[golden]
        and (option.default or None) != (REFERENCE[golden][flag] or None)
    }
    assert different == {key for key in OTHER_DEFAULTS if key[0] == script}


def test_an_old_spelling_stands_for_a_flag_of_the_trainer_that_takes_its_value():
    options = options_by_flag("sdxl_train")
    for meaning in TRAINER_REPLACED.values():
        flag, has_value, value = meaning.partition("=")
        assert flag in options
        if has_value:
            assert str(options[flag].from_text(value)).lower() == value.lower()


def test_no_flag_is_both_replaced_and_refused():
    assert not set(TRAINER_REPLACED) & set(TRAINER_REFUSED)


def test_every_reason_has_a_second_sentence_that_says_what_to_do():
    reasons = {**TRAINER_REFUSED, **PREPARE_REFUSED}
    assert not [flag for flag, reason in reasons.items() if len(reason.split(". ")) < 2 or reason[-1] not in ".'"]


def test_no_reason_advises_a_flag_that_is_refused_itself():
    part_of = {"--shuffle_caption", "--loss_type"}  # named as what the refused flag belongs to
    merge_scripts = {"--caption_extension"}  # offered by the merge scripts that the sentence names
    for flag, reason in TRAINER_REFUSED.items():
        advised = {word.strip(".,;").partition("=")[0] for word in reason.split() if word.startswith("--")}
        assert not (advised - part_of - merge_scripts) & {*TRAINER_REFUSED, *TRAINER_REPLACED}, flag
