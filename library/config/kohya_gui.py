"""What the settings window (GUI) of kohya's family saves as JSON: its fields as flags of the trainer."""

from collections.abc import Mapping
from typing import Any

from library.config.errors import UserError

_RENAMED = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "image_folder": "train_data_dir",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}

# Fields of the window that no trainer reads: its buttons and its model list, the scripts that it starts before the
# trainer, the launcher's settings, and models other than SDXL. Some stand in the TOML files that it writes, too.
GUI_ONLY = frozenset(
    {
        # the window itself
        *("model_list", "training_preset", "training_comment", "save_as_bool", "headless", "print_only", "sdxl"),
        *("sdxl_checkbox", "noise_offset_type", "learning_rate_te", "epoch", "folders", "config_dir"),
        # captions and latents, made before
        *("create_caption", "create_buckets", "generate_caption_database", "generate_image_buckets", "batch_size"),
        *("full_path", "caption_metadata_filename", "latent_metadata_filename", "use_latent_files", "train_dir"),
        # accelerate launch
        *("num_cpu_threads_per_process", "num_processes", "num_machines", "multi_gpu", "gpu_ids", "main_process_port"),
        *("dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic", "extra_accelerate_launch_args"),
        # Stable Diffusion 3 and Flux
        *(
            "sd3_checkbox",
            "sd3_cache_text_encoder_outputs",
            "sd3_cache_text_encoder_outputs_to_disk",
            "clip_g",
            "clip_l",
        ),
        *("sd3_clip_l", "sd3_clip_g", "sd3_t5xxl", "sd3_fused_backward_pass", "sd3_disable_mmap_load_safetensors"),
        *("sd3_enable_scaled_pos_embed", "sd3_text_encoder_batch_size", "mode_scale"),
        *("save_clip", "save_t5xxl", "t5xxl", "t5xxl_device", "t5xxl_dtype", "t5xxl_lr", "t5xxl_max_token_length"),
        *("weighting_scheme", "train_t5xxl", "flux1_checkbox", "flux1_cache_text_encoder_outputs", "flux1_clip_l"),
        *(
            "flux1_cache_text_encoder_outputs_to_disk",
            "flux1_t5xxl",
            "flux_fused_backward_pass",
            "ae",
            "guidance_scale",
        ),
        *("model_prediction_type", "split_mode", "split_qkv"),
        *("train_blocks", "blockwise_fused_optimizers", "cpu_offload_checkpointing", "single_blocks_to_swap"),
        *(
            "double_blocks_to_swap",
            "blocks_to_swap",
            "mem_eff_save",
            "apply_t5_attn_mask",
            "train_double_block_indices",
        ),
        *("train_single_block_indices", "img_attn_dim", "img_mlp_dim", "img_mod_dim", "single_dim", "txt_attn_dim"),
        *("txt_mlp_dim", "txt_mod_dim", "single_mod_dim", "in_dims", "enable_all_linear"),
        *(
            "lumina_checkbox",
            "pos_emb_random_crop_rate",
            "clip_l_dropout_rate",
            "clip_g_dropout_rate",
            "t5_dropout_rate",
        ),
        *("disable_mmap_load", "chroma_checkbox", "use_shell", "unit"),
    }
)

_ZERO_IS_EMPTY = frozenset({"max_timestep", "max_train_epochs", "max_train_steps", "seed", "vae_batch_size"})
_BOTH_AS_ATTENTION = frozenset({"xformers", "sdpa"})  # a choice of attention: here it is always torch's


def flags_of_gui(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags, without dashes, and their values from the settings that the GUI saved.

    Fields that were left alone are left out. Raise `UserError` for fields that hold what no file of options can.
    """
    fields = {key: value for key, value in saved.items() if not _is_empty(key, value)}
    flags = {
        _RENAMED.get(key, key): value
        for key, value in fields.items()
        if key not in _DERIVED | _BOTH_AS_ATTENTION | GUI_ONLY
    }
    for derive in (_captions, _length, _warmup, _words, _tracker, _refuse_texts):
        flags |= derive(fields)
    if "image_folder" in fields:  # the tab for fine-tuning, which always passes it
        flags.setdefault("enable_bucket", True)
    return flags


_DERIVED = frozenset(
    {"lr_warmup", "optimizer_args", "lr_scheduler_args", "use_wandb", "additional_parameters", "sample_prompts"}
)


def _is_empty(key: str, value: Any) -> bool:
    return value is None or value == "" or (key in _ZERO_IS_EMPTY and str(value) in ("0", "0.0"))


def _captions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata file, which the GUI names by its folder and by whether latents were prepared."""
    if "train_dir" not in fields or "in_json" in fields:
        return {}
    prepared = fields.get("use_latent_files", "Yes") == "Yes"
    field, usual = (
        ("latent_metadata_filename", "meta_lat.json") if prepared else ("caption_metadata_filename", "meta_cap.json")
    )
    return {"in_json": f"{fields['train_dir']}/{fields.get(field, usual)}"}


def _length(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of epochs, which the GUI turns into steps unless steps or epochs are set."""
    if "epoch" not in fields or "max_train_epochs" in fields or "max_train_steps" in fields:
        return {}
    return {"max_train_epochs": fields["epoch"]}


def _warmup(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the warm-up steps as a fraction: the GUI counts them in percent of all steps."""
    percent = fields.get("lr_warmup", 0)
    if fields.get("lr_warmup_steps") not in (None, 0, "0") or fields.get("lr_scheduler") in (None, "constant"):
        return {}
    try:
        fraction = float(percent) / 100
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise UserError(f"lr_warmup is {percent!r}.", "It must be a percentage of all steps, from 0 to 99.")
    return {"lr_warmup_steps": fraction}


def _words(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that stand in one line as lists."""
    lines = {key: fields[key] for key in ("optimizer_args", "lr_scheduler_args") if key in fields}
    return {key: line.replace('"', "").split() if isinstance(line, str) else line for key, line in lines.items()}


def _tracker(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"log_with": "wandb"} if fields.get("use_wandb") is True else {}


def _refuse_texts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt file. Raise `UserError` for prompts and flags that are written into a field."""
    if "additional_parameters" in fields:
        raise UserError(
            f"additional_parameters: '{fields['additional_parameters']}' belongs to the command line.",
            "Pass it there, and empty the field.",
        )
    prompts = fields.get("sample_prompts")
    if prompts is None:
        return {}
    if not isinstance(prompts, str) or "\n" in prompts or " --" in prompts:
        raise UserError(
            "sample_prompts holds the prompts themselves.",
            "Save them as a text file, and set the field to its name.",
        )
    return {"sample_prompts": prompts}
