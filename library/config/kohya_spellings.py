"""The spellings of kohya's trainers for each script: the tables of flags, and the values that ask for nothing."""

from library.config.kohya_flags import (
    GENERATE_REFUSED,
    GENERATE_REPLACED,
    PREPARE_REFUSED,
    PREPARE_REPLACED,
    TRAINER_REFUSED,
    TRAINER_REPLACED,
)
from library.config.kohya_gui import GUI_ONLY
from library.config.spellings import Spellings
from library.config.wishes import TRAINER_WISHES

# Of refused flags, beside false, 0, none and empty, which ask for nothing in every one: the reference's defaults, and
# what its settings window writes for a field that its user left alone.
NEUTRAL_REFUSED: dict[str, tuple[str, ...]] = {
    "--clip_skip": ("1",),
    "--zero_stage": ("2",),
    "--factor": ("-1",),
    "--LoRA_type": ("Standard",),
}
_LISTS = frozenset({"--network_args", "--base_weights", "--base_weights_multiplier"})

# Of options: written by others for what leaving the flag out means here.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "--ddp_gradient_as_bucket_view": ("false", "no", "off", "0"),  # as --sdpa
    "--sdpa": ("false", "no", "off", "0"),  # the reference's default; here it is always on
    "--resolution": ("None", ""),
    "--max_token_length": ("75",),
    "--dynamo_backend": ("no",),
    "--dry_run": ("false", "no", "off", "0"),  # a switch there, --debug_dataset
    "--adaptive_noise_scale": ("0",),
    "--loss_type": ("l2",),  # in any case
    "--timestep_sampling": ("sigma", ""),  # what the window writes for a model that is no flow
    **dict.fromkeys(("--min_snr_gamma", "--ip_noise_gamma", "--v_pred_like_loss"), ("0", "false")),
    **dict.fromkeys(
        (
            *("--pretrained_model_name_or_path", "--vae", "--resume", "--output_name", "--block_lr", "--log_prefix"),
            *("--log_tracker_name", "--wandb_run_name", "--metadata_title", "--metadata_author", "--metadata_license"),
            *("--metadata_description", "--metadata_tags", "--caption_separator", "--caption_extension"),
            *("--huggingface_repo_id", "--huggingface_path_in_repo", "--huggingface_token", "--wandb_api_key"),
            *("--metadata_usage_hint", "--metadata_trigger_phrase", "--metadata_merged_from", "--metadata_thumbnail"),
            *("--face_crop_aug_range", "--dataset_class"),
        ),
        ("",),
    ),
    **dict.fromkeys(
        (
            *(
                "--lr_scheduler_timescale",
                "--max_train_epochs",
                "--sample_every_n_steps",
                "--sample_every_n_epochs",
                "--save_every_n_steps",
            ),
            *("--save_every_n_epochs", "--save_last_n_steps", "--save_last_n_epochs", "--save_last_n_steps_state"),
            *("--save_last_n_epochs_state", "--save_n_epoch_ratio", "--save_every_n_minutes"),
            *("--validate_every_n_steps", "--validate_every_n_epochs"),
            "--max_validation_steps",
        ),
        ("0",),
    ),
}

TRAINER_SPELLINGS = Spellings(
    replaced=TRAINER_REPLACED,
    refused=TRAINER_REFUSED,
    neutral=NEUTRAL,
    neutral_refused=NEUTRAL_REFUSED,
    lists=_LISTS,
    file_only=GUI_ONLY,
    # A settings window writes both rates whatever is trained.
    idle=dict.fromkeys(("learning_rate_te1", "learning_rate_te2"), "train_text_encoder"),
    wishes=TRAINER_WISHES,
)
PREPARE_SPELLINGS = Spellings(replaced=PREPARE_REPLACED, refused=PREPARE_REFUSED)
GENERATE_SPELLINGS = Spellings(replaced=GENERATE_REPLACED, refused=GENERATE_REFUSED)
