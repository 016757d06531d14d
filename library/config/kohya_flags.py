"""The flags of kohya's trainer that are spelled differently here, and those that are refused, with the reason.

Every flag of the 2026 reference is either a field of an option class or stands in one of these tables, so that a
command brought from there either does the same here or stops and says why. `Spellings` says how the tables
are read.
"""

TRAINER_REPLACED: dict[str, str] = {
    "--xformers": "--sdpa",
    "--mem_eff_attn": "--sdpa",
    "--diffusers_xformers": "--sdpa",
    "--use_8bit_adam": "--optimizer_type=AdamW8bit",
    "--use_lion_optimizer": "--optimizer_type=Lion",
    "--use_safetensors": "--save_model_as=safetensors",
    "--fused_optimizer_groups": "--fused_backward_pass=true",
}

PREPARE_REPLACED: dict[str, str] = {}

_OTHER_MODEL: dict[str, str] = {
    "--v2": "belongs to Stable Diffusion 2, and this project is for SDXL alone. Leave it off for an SDXL checkpoint.",
    "--clip_skip": "SDXL was trained on the last block but one of both text encoders, and always reads that one here. "
    "Leave the flag off.",
    "--metadata_preprocessor": "describes ControlNet models. For a fine-tuned SDXL leave it off.",
    "--metadata_is_negative_embedding": "describes textual inversion embeddings. For a fine-tuned SDXL leave it off.",
    "--fp8_base": "keeps frozen base weights in 8 bits, which helps only where a LoRA is trained beside them; here the "
    "weights themselves are trained. Use --full_bf16 to save memory.",
}

_DEEPSPEED: dict[str, str] = {
    flag: f"belongs to DeepSpeed, which is not offered. FSDP2 is, {equivalent}. {instead}"
    for flag, equivalent, instead in (
        (
            "--deepspeed",
            "which shards the same with PyTorch alone",
            "docs/many-gpus.md has accelerate's files for 2 and 8 GPUs.",
        ),
        (
            "--zero_stage",
            "whose fsdp_reshard_after_forward is stage 3, and without it stage 2",
            "On one GPU --fused_backward_pass frees the gradients.",
        ),
        (
            "--offload_optimizer_device",
            "whose shards of its state --offload_optimizer keeps on the host",
            "It needs no configuration.",
        ),
        (
            "--offload_optimizer_nvme_path",
            "which has no such thing",
            "--offload_optimizer keeps the optimizer's state in host memory.",
        ),
        (
            "--offload_param_device",
            "whose fsdp_offload_params is this and is refused",
            "Each GPU keeps its part of the weights.",
        ),
        (
            "--offload_param_nvme_path",
            "which has no such thing",
            "--full_bf16 and --gradient_checkpointing make the weights fit.",
        ),
        (
            "--zero3_init_flag",
            "whose fsdp_cpu_ram_efficient_loading is this and is refused",
            "The checkpoint is always mapped from the disk. Leave it off.",
        ),
        (
            "--zero3_save_16bit_model",
            "which always saves models whole",
            "--save_precision=fp16 saves in 16 bits.",
        ),
        (
            "--fp16_master_weights_and_gradients",
            "which has no such thing",
            "--full_bf16 holds weights and gradients in 16 bits.",
        ),
    )
}

_PRECISION_AND_MEMORY: dict[str, str] = {
    "--full_fp16": "in pure fp16 small gradients become zero and large activations overflow. Use --full_bf16, or "
    "--mixed_precision=fp16 on a card without bf16.",
    "--lowram": "the checkpoint is always mapped from the disk and never held twice. Leave it off.",
    "--highvram": "there is no low-memory mode to switch off. Leave it off.",
    "--disable_mmap_load_safetensors": "mapping the file is what keeps loading small. If it is slow from a network "
    "drive, copy the checkpoint to a local disk first.",
    **_DEEPSPEED,
}

_FILES_AND_LOGS: dict[str, str] = {
    "--tokenizer_cache_dir": "no tokenizer is downloaded: its vocabulary comes with the installed packages. Leave it "
    "off.",
}

_LORA_ADVICE = (
    "belongs to LoRA training, and this trainer trains the whole model. Leave it off; a LoRA can be extracted from the "
    "saved model afterwards."
)
_DREAMBOOTH_ADVICE = "belongs to DreamBooth training. Leave it off; captions of all images stand in --in_json."

# Flags of the reference's other trainers, and of the files that its settings window writes for them.
OTHER_TRAINERS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("--network_module", "--network_dim", "--network_alpha", "--network_args", "--network_weights"),
            *("--network_dropout", "--network_train_unet_only", "--network_train_text_encoder_only", "--LoRA_type"),
            *("--LyCORIS_preset", "--unet_lr", "--text_encoder_lr", "--dim_from_weights", "--scale_weight_norms"),
            *("--base_weights", "--base_weights_multiplier", "--no_metadata", "--fp8_base_unet"),
            *("--skip_until_initial_step", "--initial_epoch", "--initial_step", "--lora_network_weights", "--conv_dim"),
            *("--conv_alpha", "--conv_block_dims", "--conv_block_alphas", "--block_dims", "--block_alphas"),
            *("--down_lr_weight", "--mid_lr_weight", "--up_lr_weight", "--block_lr_zero_threshold", "--rank_dropout"),
            *("--rank_dropout_scale", "--module_dropout", "--decompose_both", "--train_on_input", "--train_norm"),
            *("--use_cp", "--use_tucker", "--use_scalar", "--constrain", "--rescaled", "--bypass_mode", "--dora_wd"),
            *("--factor", "--loraplus_lr_ratio", "--loraplus_unet_lr_ratio", "--loraplus_text_encoder_lr_ratio"),
            *("--ggpo_beta", "--ggpo_sigma"),
        ),
        _LORA_ADVICE,
    ),
    **dict.fromkeys(
        (
            *("--stop_text_encoder_training", "--stop_text_encoder_training_pct"),
            *("--no_token_padding", "--class_tokens", "--instance_prompt", "--class_prompt"),
        ),
        _DREAMBOOTH_ADVICE,
    ),
    **dict.fromkeys(
        ("--lowvram", "--network_merge_n_models"),
        "belongs to other trainers. Leave it off; --gradient_checkpointing and --full_bf16 save memory.",
    ),
}

TRAINER_REFUSED: dict[str, str] = {
    **_OTHER_MODEL,
    **_PRECISION_AND_MEMORY,
    **_FILES_AND_LOGS,
    **OTHER_TRAINERS,
}

PREPARE_REFUSED: dict[str, str] = {"--v2": _OTHER_MODEL["--v2"]}

GENERATE_REPLACED: dict[str, str] = {
    "--n_iter": "--images_per_prompt",
    "--xformers": "--sdpa",
    "--diffusers_xformers": "--sdpa",
}

GENERATE_REFUSED: dict[str, str] = {
    "--v2": _OTHER_MODEL["--v2"],
    "--clip_skip": _OTHER_MODEL["--clip_skip"],
    **dict.fromkeys(
        ("--network_module", "--network_weights", "--network_mul", "--network_merge", "--textual_inversion_embeddings"),
        "LoRAs and embeddings are not read. Merge a LoRA into the model first, or draw with ComfyUI or a WebUI.",
    ),
    **dict.fromkeys(
        ("--image_path", "--mask_path", "--strength", "--control_net_models", "--guide_image_path"),
        "images are drawn from prompts alone here. Draw with ComfyUI, which opens the workflow in each image.",
    ),
    **dict.fromkeys(
        ("--highres_fix_scale", "--highres_fix_steps", "--deep_shrink_depth", "--gradual_latent_timesteps"),
        "images are drawn at one size, as the samples of a run. Draw with ComfyUI, which opens the workflow in each "
        "image.",
    ),
}
