"""What people ask for under a name that no flag has, and the answer to each."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """Names, without dashes, that ask for one thing: a pattern for all of such a name, and what to do instead.

    Where `offered` matches a flag of the script, that flag is the answer in place of `answer`.
    """

    names: str
    answer: str
    offered: str | None = None


def granted(flag: str, known: Collection[str], wishes: Sequence[Wish]) -> str:
    """Return the answer to the first wish that `flag` expresses, or "" if it expresses none."""
    name = flag.lstrip("-").replace("-", "_").lower()
    for wish in wishes:
        if re.fullmatch(wish.names, name):
            offered = [each for each in known if wish.offered and re.search(wish.offered, each)]
            return f"Did you mean {offered[0]}?" if offered else wish.answer
    return ""


_L = r"(l|clip_?l|te_?1|te_?l|text_encoder_?(1|l|one))"
_G = r"(g|clip_?g|bigg|openclip|te_?2|te_?g|text_encoder_?(2|g|two))"
_BOTH = r"(te|tes|text|clip|text_encoders?|textencoders?)"
_UNET = r"(u_?net|transformer|dit)"
_RATE = r"(lr|learning_?rate|rate)"
_FREEZE = r"(freeze|frozen|lock|no_train|dont_train|skip|disable)"

TRAINER_WISHES = (
    # Learning rates and freezing, by encoder.
    Wish(
        rf"{_RATE}_(of_)?{_L}|{_L}_{_RATE}",
        "The learning rate of text encoder L is --learning_rate_te1, with --train_text_encoder.",
    ),
    Wish(
        rf"{_RATE}_(of_)?{_G}|{_G}_{_RATE}",
        "The learning rate of text encoder G is --learning_rate_te2, with --train_text_encoder.",
    ),
    Wish(
        rf"{_RATE}_(of_)?{_BOTH}|{_BOTH}_{_RATE}",
        "The text encoders' learning rates are --learning_rate_te1 (L) and --learning_rate_te2 (G), with "
        "--train_text_encoder.",
    ),
    Wish(rf"{_RATE}_(of_)?{_UNET}|{_UNET}_{_RATE}", "The learning rate of the U-Net is --learning_rate."),
    Wish(
        rf"({_UNET}_)?(block|layer)s?_?(wise)?_({_RATE}s?|weights?)", "The rates of the U-Net's blocks are --block_lr."
    ),
    Wish("lr|rate|base_lr|unet_and_te_lr", "Did you mean --learning_rate?"),
    Wish(
        rf"{_FREEZE}_{_L}|(train_)?{_G}_only|train_only_{_G}",
        "--train_text_encoder --learning_rate_te1=0 trains G and freezes text encoder L. Without --train_text_encoder "
        "both are frozen.",
    ),
    Wish(
        rf"{_FREEZE}_{_G}|(train_)?{_L}_only|train_only_{_L}",
        "--train_text_encoder --learning_rate_te2=0 trains L and freezes text encoder G. Without --train_text_encoder "
        "both are frozen.",
    ),
    Wish(
        rf"{_FREEZE}_{_BOTH}|(train_)?{_UNET}_only|train_only_{_UNET}|no_{_BOTH}(_training)?",
        "Both text encoders are frozen unless --train_text_encoder is set.",
    ),
    Wish(
        rf"{_FREEZE}_{_UNET}|train_{_BOTH}_only|train_only_{_BOTH}",
        "--learning_rate=0 freezes the U-Net. With --train_text_encoder, --learning_rate_te1 and --learning_rate_te2 "
        "are the rates of L and G.",
    ),
    Wish(
        rf"train_({_BOTH}|{_L}|{_G})|(enable|use)_{_BOTH}_training",
        "--train_text_encoder trains both text encoders; a rate of 0 in --learning_rate_te1 (L) or --learning_rate_te2 "
        "(G) freezes one of them.",
    ),
    # What is not offered.
    Wish(r"(use_|enable_|with_)?ema|ema_(weights|model|only|validation)", "Did you mean --ema?"),
    Wish(
        r"(ema_)?(max_|model_)?decay|ema_(max_decay|rate|beta|momentum)|decay_ema",
        "The decay of the moving average is --ema_decay, with --ema.",
    ),
    Wish(
        r"ema_(update_)?(steps?|interval|freq(uency)?|update_interval|update_step_interval|update_after|update_every)",
        "Did you mean --ema_every?",
    ),
    Wish(r"ema_(inv_gamma|gamma|warm_?up\w*)|use_ema_warmup", "The average is always warmed up; --ema_power says how."),
    Wish(
        r"ema_(cpu|cpu_only|offload)|offload_ema|ema_on_cpu",
        "--ema_device=cpu keeps the moving averages in host memory.",
    ),
    Wish(
        r"(post_?hoc|power)_ema|ema_(snapshots?|length|std|profiles?|sigma)\w*|karras_ema|edm2_ema|phema",
        "--ema_snapshot_every_n_steps saves what finetune/reconstruct_ema.py builds any EMA length from.",
    ),
    Wish(r"(use_)?ema(_\w+)?|\w+_ema", "The moving average of the weights is --ema, with --ema_decay."),
    Wish(
        r"(use_|do_)?val(id(ation)?)?(_(?!prompt)\w+)?|validate(_\w+)?|eval(uation)?(_(?!prompt)\w+)?|num_validation_images",
        "--validation_split=0.1 holds out images and measures the loss on them after each epoch. --sample_prompts "
        "draws images during training.",
    ),
    Wish(
        r"dry_?run|check(_only)?|test_run|plan_only|no_train(ing)?",
        "Mistakes in options, captions and prompts are reported before the model is loaded; --max_train_steps=1 tries "
        "everything else.",
        r"--dry_?run",
    ),
    Wish(
        r"(use_|train_)?(lora|loha|lokr|lycoris|locon|dora|peft|network|adapter)(_\w+)?|(network_)?rank|\w+_lora",
        "This trainer trains the whole model, no LoRA: leave it off. A LoRA can be extracted from the saved model "
        "afterwards.",
    ),
    Wish(
        r"(use_|enable_)?mask(s|ed|ing)?(_\w+)?|mask_?(dir|folder|path)|alpha(_\w+)?|loss_mask\w*",
        "--masked_loss with --conditioning_data_dir, a folder of masks, or --alpha_mask, the transparency of the "
        "images, says which parts are trained.",
    ),
    # Names of diffusers' scripts and of other trainers.
    Wish(r"batch_?size|bs|micro_batch_size|per_device_train_batch_size", "Did you mean --train_batch_size?"),
    Wish(r"(num_)?(train_)?epochs?|max_epochs?|n_epochs?", "Did you mean --max_train_epochs?"),
    Wish(r"(num_|max_|total_|train_)*(train_|training_)?(steps?|iterations|iters)", "Did you mean --max_train_steps?"),
    Wish(
        r"(base_)?(model|checkpoint|ckpt|unet)(_path|_name|_name_or_path|_file)?|pretrained_model(_path|_name)?|base",
        "Did you mean --pretrained_model_name_or_path?",
    ),
    Wish(r"vae_(path|model|file|name_or_path)|pretrained_vae\w*", "Did you mean --vae?"),
    Wish(
        r"save_(every|steps|interval|freq(uency)?|every_n|iterations)|checkpointing_steps|checkpoint_every",
        "Did you mean --save_every_n_steps or --save_every_n_epochs?",
    ),
    Wish(
        r"checkpoints_total_limit|save_total_limit|max_to_keep|keep_(last|n|checkpoints)(_\w+)?|save_last(_n)?|"
        r"max_(num_)?checkpoints",
        "--save_last_n_steps and --save_last_n_epochs say what is kept. The first counts steps, not files: with "
        "--save_every_n_steps=100, 200 keeps three models.",
    ),
    Wish(r"resume_(from|path|state|training)(_\w+)?|continue(_\w+)?|restart|load_state", "Did you mean --resume?"),
    Wish(r"(sample_|validation_|eval_)?prompts?(_file|_path)?|samples?", "Did you mean --sample_prompts?"),
    Wish(
        r"sample_(every|steps|interval|freq(uency)?)|validation_(steps|epochs)", "Did you mean --sample_every_n_steps?"
    ),
    Wish(
        r"(fp|float|bf|bfloat)_?16|fp32|precision|dtype|half|amp", "Did you mean --mixed_precision (no, fp16 or bf16)?"
    ),
    Wish(r"(full_|pure_)(fp|float)_?32", "Weights are held in float32 unless --full_bf16 is set."),
    Wish(
        r"weight_decay|(adam_)?(betas?\d?|eps(ilon)?)|momentum|d_coef|optimizer_(kwargs|arguments?|params)",
        "Arguments of the optimizer go into --optimizer_args: --optimizer_args weight_decay=0.01 betas=0.9,0.99.",
    ),
    Wish(
        r"(use_)?(adam\w*|lion\w*|prodigy|adafactor|sgd|optim(izer)?|optimizer_name)", "Did you mean --optimizer_type?"
    ),
    Wish(r"(lr_)?warm_?up(_steps|_ratio|_pct|_percent)?|num_warmup_steps|lr_warmup", "Did you mean --lr_warmup_steps?"),
    Wish(r"schedul(er|e)(_type|_name)?|lr_schedule", "Did you mean --lr_scheduler?"),
    Wish(r"grad(ient)?_?clip(ping)?(_\w+)?|clip_grad(_\w+)?|max_norm", "Did you mean --max_grad_norm?"),
    Wish(r"grad(ient)?_?accum(ulation|ulate)?(_steps)?", "Did you mean --gradient_accumulation_steps?"),
    Wish(
        r"(enable_)?(xformers|flash_attn|flash_attention|attention)(_\w+)?|enable_xformers\w*",
        "Attention is torch's scaled_dot_product_attention, always. Leave it off.",
    ),
    Wish(r"random_flip|flip|horizontal_flip|mirror", "Did you mean --flip_aug?"),
    Wish(r"buckets?|use_buckets?|bucketing|enable_bucketing", "Did you mean --enable_bucket?"),
    Wish(r"center_crop|crop", "Images are cropped at the center to their bucket. Leave it off."),
    Wish(r"snr_gamma|min_snr", "The loss weights of min-SNR are --min_snr_gamma.", r"--min_snr_gamma"),
    Wish(
        r"(instance_|train_|image_|images?_|input_|data_?|dataset_)*(data|dataset|images?)_?(dir|folder|path|root|name)?",
        "Did you mean --train_data_dir, the folder of the images, or --in_json, the captions?",
    ),
    Wish(
        r"caption_?[lg]|captions?(_file|_dir|_column|_json)?|meta(data)?(_json|_file)?|json",
        "Captions of both encoders are read from --in_json, which the merge scripts in finetune/ write.",
    ),
    Wish(r"out(put)?(_folder|_path)?|save_dir|save_path|outdir", "Did you mean --output_dir?"),
    Wish(r"(run_|model_|save_)?name|output_file|save_name", "Did you mean --output_name?"),
    Wish(r"size|res|image_size|width|height|img_size", "Did you mean --resolution?"),
    Wish(
        r"report_to|logger|tracker|(use_)?wandb|(use_)?tensorboard|log_dir|logdir",
        "Did you mean --logging_dir or --log_with?",
    ),
    Wish(
        r"quiet|silent|verbose|debug|log_level|verbosity",
        "Did you mean --console_log_level? --quiet belongs to accelerate launch and stands before sdxl_train.py.",
    ),
    Wish(
        r"(num_)?(workers|dataloader_num_workers|data_loader_workers)|num_workers\w*",
        "Did you mean --max_data_loader_n_workers?",
    ),
    Wish(
        r"num_processes|num_machines|multi_gpu|gpu_ids|num_cpu_threads_per_process|main_process_port|mixed_precision_type|"
        r"gpus?|num_gpus|device|devices",
        "This belongs to accelerate launch: write it before sdxl_train.py.",
    ),
    Wish(r"compile|use_compile|torchcompile", "Did you mean --torch_compile?"),
    Wish(r"max_(seq(uence)?_|caption_)?(length|tokens)|token_length|max_tokens", "Did you mean --max_token_length?"),
    Wish(r"(random_|rng_)seed|manual_seed", "Did you mean --seed?"),
    Wish(r"config|config_path|toml|preset", "Did you mean --config_file?"),
)
