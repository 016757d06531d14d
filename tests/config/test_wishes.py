"""Flags that no script has: what is meant is named, and a name that merely shares letters is not."""

import re

import pytest

from library.config.errors import nearest
from library.config.kohya_flags import TRAINER_REFUSED
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import options_of
from library.config.wishes import TRAINER_WISHES, Wish, granted
from library.training.run_options import OPTION_CLASSES

FLAGS = [name for cls in OPTION_CLASSES for each in options_of(cls) for name in (each.flag, *each.aliases)]

MEANT = {
    "--learning_rate_te1": [
        "learning_rate_l",
        "lr_l",
        "lr_clip_l",
        "text_encoder_1_lr",
        "te1_lr",
        "learning_rate_te_l",
    ],
    "--learning_rate_te2": ["learning_rate_g", "lr_g", "text_encoder_2_learning_rate", "lr-te2", "clip_g_lr"],
    "--learning_rate_te2=0": ["freeze_g", "freeze_text_encoder_2", "train_l_only"],
    "--learning_rate_te1=0": ["freeze_l", "freeze_clip_l", "freeze_te1", "train_only_g"],
    "unless --train_text_encoder": ["freeze_text_encoder", "freeze_te", "unet_only", "train_unet_only"],
    "--learning_rate=0 freezes": ["freeze_unet", "train_text_encoder_only"],
    "--learning_rate?": ["lr"],
    "of the U-Net is --learning_rate.": ["learning_rate_unet"],
    "--train_batch_size?": ["batch_size", "bs", "per_device_train_batch_size"],
    "--max_train_epochs?": ["epochs", "num_train_epochs", "max_epochs"],
    "--max_train_steps?": ["steps", "num_steps", "max_steps", "training_steps"],
    "--pretrained_model_name_or_path?": ["model", "checkpoint", "model_path", "ckpt"],
    "--save_every_n_steps or": ["save_every", "checkpointing_steps", "save_steps"],
    "--save_last_n_steps and": ["checkpoints_total_limit", "keep_last"],
    "--resume?": ["resume_from_checkpoint", "continue"],
    "--sample_prompts?": ["prompts", "validation_prompt", "prompt"],
    "--mixed_precision": ["fp16", "bf16", "precision"],
    "--optimizer_args": ["weight_decay", "adam_beta1", "betas"],
    "--optimizer_type?": ["optimizer", "use_adafactor", "prodigy"],
    "--max_grad_norm?": ["grad_clip", "gradient_clipping", "clip_grad_norm"],
    "--lr_warmup_steps?": ["warmup", "warmup_steps"],
    "--console_log_level?": ["quiet", "verbose"],
    "accelerate launch": ["num_processes", "gpu_ids"],
    "--flip_aug?": ["random_flip", "flip"],
    "LoRA": ["lora", "lora_rank", "rank", "network_modul", "use_lora"],
    "--ema?": ["use_ema", "enable_ema"],
    "--ema_decay": ["ema_max_decay", "decay"],
    "--ema_every": ["ema_update_interval", "ema_update_step_interval", "ema_steps"],
    "--ema_device=cpu": ["ema_cpu_only", "offload_ema"],
    "--ema_snapshot_every_n_steps": ["post_hoc_ema", "ema_length"],
    "--validation_split=0.1": ["validation_steps_per_epoch", "validation_data_dir", "eval_steps", "val_split"],
    "--max_train_steps=1": ["dry_run", "dry-run"],
    "--in_json": ["caption_l", "captions", "data_dir"],
}


def test_likely_wishes_are_answered_with_what_does_them():
    for meant, names in MEANT.items():
        for name in names:
            advice = TRAINER_SPELLINGS.advice(f"--{name}", FLAGS)
            is_offered_by_now = re.fullmatch(r"Did you mean --\S*(ema|valid|dry)\S*\?", advice)
            assert meant in advice or is_offered_by_now, f"{name}: {advice}"


@pytest.mark.parametrize("name", ["use_ema", "ema", "zzz", "banana", "sed_rate", "set", "in"])
def test_a_name_that_merely_shares_letters_is_not_suggested(name: str):
    assert "--seed" not in TRAINER_SPELLINGS.advice(f"--{name}", FLAGS)
    assert nearest(f"--{name}", ["--seed", "--resume", "--vae"]) == ""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--learning_rte", "--learning_rate"),
        ("--optimiser_type", "--optimizer_type"),
        ("--gradient_checkpoint", "--gradient_checkpointing"),
        ("--save_precison", "--save_precision"),
        ("--sede", "--seed"),
        ("--outputdir", "--output_dir"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(written: str, meant: str):
    assert TRAINER_SPELLINGS.advice(written, FLAGS) == f"Did you mean {meant}?"


def test_every_answer_names_flags_that_exist():
    for wish in TRAINER_WISHES:
        named = set(re.findall(r"--\w+", wish.answer)) - {"--quiet"}
        unknown = named - set(FLAGS) - set(TRAINER_REFUSED)
        assert not unknown, wish.names


def test_a_wish_is_answered_with_the_flag_once_it_is_offered():
    wishes = (Wish("use_ema", "Not offered.", r"--ema"),)
    assert granted("--use_ema", ["--seed"], wishes) == "Not offered."
    assert granted("--use-ema", ["--seed", "--ema_decay"], wishes) == "Did you mean --ema_decay?"
