"""Questions to the trainer's flags and their answers, for docs/flags.md; a test parses the flags of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a user wants, the flags that do it, and what to know about them."""

    question: str
    flags: str
    remark: str = ""


ANSWERS = (
    Answer(
        "freeze L and train G?",
        "--train_text_encoder --learning_rate_te1=0 --learning_rate_te2=1e-6",
        "A rate of 0 freezes. Without `--train_text_encoder` both are frozen.",
    ),
    Answer(
        "freeze G and train L?",
        "--train_text_encoder --learning_rate_te1=1e-6 --learning_rate_te2=0",
    ),
    Answer(
        "set the learning rate of G?",
        "--learning_rate=1e-5 --train_text_encoder --learning_rate_te2=2e-6",
        "te2 is G, te1 is L. A rate that is not set is `--learning_rate`.",
    ),
    Answer(
        "train the text encoders alone?",
        "--learning_rate=0 --train_text_encoder --learning_rate_te1=1e-6 --learning_rate_te2=1e-6",
    ),
    Answer(
        "see whether the model learns what it was not shown?",
        "--validation_split=0.1 --logging_dir=logs",
        "A tenth of the images is held out and measured after each epoch: the curve `validation/loss`.",
    ),
    Answer(
        "see what each text encoder is worth?",
        "--validation_split=0.1 --validation_ablation --validate_at_first --max_train_steps=0",
        "Measures a finished model and saves nothing; docs/separate-captions.md explains the figures.",
    ),
    Answer(
        "save every 100 steps and keep three models?",
        "--save_every_n_steps=100 --save_last_n_steps=200",
        "The second number counts steps: after step 500 the models of steps 300, 400 and 500 are there.",
    ),
    Answer(
        "save every epoch and keep three models?",
        "--save_every_n_epochs=1 --save_last_n_epochs=3",
        "The second number counts models.",
    ),
    Answer(
        "save now, without stopping?",
        "",
        "Create an empty file named `save` in `--output_dir` (`save-NAME` where several runs share it): model and "
        "state are saved after the current step.",
    ),
    Answer(
        "lose at most ten minutes of a run that is killed?",
        "--save_every_n_minutes=10",
        "One model and one state, `NAME-recent`, each replaced by the next. `--resume=latest` finds the state.",
    ),
    Answer(
        "continue a run that was stopped or killed?",
        "--resume=latest",
        "The same command as before, and this flag. A stop saves a state; `--save_state` saves one with every model, "
        "for the run that is killed.",
    ),
    Answer(
        "upload what is saved?",
        "--huggingface_repo_id=alice/my-model --async_upload",
        "Run `hf auth login` once before. Add `--save_state_to_huggingface` for the states, from which "
        "`--resume=latest --resume_from_huggingface` continues on another machine.",
    ),
    Answer(
        "train longer than planned?",
        "--resume=latest --max_train_steps=3000",
        "Needs the state of the end: `--save_state_on_train_end` in the run before.",
    ),
    Answer(
        "continue from a model without a state?",
        "--pretrained_model_name_or_path=output/model.safetensors --output_name=model-2",
        "A new run with the model's weights: the optimizer and the count of steps start from nothing. Under the old "
        "name it would write over the model that it starts from, and is refused.",
    ),
    Answer(
        "change captions?",
        "",
        "Edit the `.txt` (L) and `.caption` (G) files and run both merge scripts again, with the trainer's metadata as "
        "`out_json`: buckets and latents stay. A run that is resumed then also needs `--resume_anyway`.",
    ),
    Answer(
        "add images?",
        "",
        "Run both merge scripts, then `prepare_buckets_latents.py --skip_existing`, which encodes the new ones alone.",
    ),
    Answer(
        "use less GPU memory?",
        "--mixed_precision=bf16 --full_bf16 --gradient_checkpointing --fused_backward_pass --max_grad_norm=0",
        "[performance.md](performance.md) has the flags for 8 to 24 GB.",
    ),
    Answer(
        "train with AdamW on 24 GB?",
        "--optimizer_type=AdamW --offload_optimizer --fused_backward_pass --max_grad_norm=0",
        "Its state lies in 9.6 GiB of host memory; see [performance.md](performance.md#offloaded-state).",
    ),
    Answer(
        "see the learning rates before I train?",
        "--plot_schedule=rates.png",
        "Draws the rate of each part over the run, and exits.",
    ),
    Answer("see what it learns?", "--sample_prompts=prompt.txt --sample_every_n_steps=100"),
    Answer(
        "see what L and G decide?",
        "--sample_prompts=prompt.txt --sample_grid",
        "Each L prompt with each G prompt, before the first step and after the last.",
    ),
    Answer(
        "keep a moving average (EMA)?",
        "--ema --sample_prompts=prompt.txt --sample_every_n_steps=100 --sample_ema",
        "Saved beside each model, as `..._ema.safetensors`, and drawn beside it.",
    ),
    Answer(
        "choose the length of the EMA afterwards?",
        "--ema_snapshot_every_n_steps=200",
        "`finetune/reconstruct_ema.py` then builds the model of any length: [moving-averages.md](moving-averages.md).",
    ),
    Answer(
        "see all samples side by side?",
        "",
        "`python finetune/contact_sheet.py output/sample` writes a page and an image, a column for each step.",
    ),
    Answer("see curves?", "--logging_dir=logs", "Then `tensorboard --logdir logs`."),
    Answer(
        "show a run to somebody?",
        "--logging_dir=logs",
        "`python finetune/run_report.py output` writes one page: options, curves, samples, what L and G are worth.",
    ),
    Answer("use captions of more than 75 tokens?", "--max_token_length=225"),
    Answer(
        "keep the flags in a file?",
        "--config_file=my_run.toml --output_config",
        "Writes the flags of the command and exits; after that `--config_file=my_run.toml` is enough.",
    ),
    Answer(
        "use what kohya's settings window saved?",
        "--config_file=saved.json",
        "What this trainer does not offer is named with its reason.",
    ),
    Answer(
        "try a command without training?", "--max_train_steps=1", "Mistakes are reported before the model is loaded."
    ),
    Answer("repeat a run exactly?", "--seed=1", "Without it the seed is drawn, and reported at the start."),
    Answer("print less?", "--console_log_level=WARNING", "The progress bar stays."),
)

TWO_READINGS = (
    Answer(
        "",
        "--save_every_n_steps=100 --save_last_n_steps=200",
        "Keeps the models of the last 200 steps: three of them. 100 would keep two, 3 would keep one.",
    ),
    Answer(
        "",
        "--save_every_n_epochs=2 --save_last_n_epochs=3",
        "Keeps three models, those of epochs 6, 8 and 10 after epoch 10: models are counted, not epochs.",
    ),
    Answer("", "--lr_scheduler=cosine --lr_warmup_steps=0.1", "A tenth of all steps. 1 and more is a number of steps."),
    Answer(
        "",
        "--gradient_accumulation_steps=4 --max_train_steps=500",
        "500 optimizer steps, each of 4 batches. `--save_every_n_steps` and `--sample_every_n_steps` count optimizer "
        "steps, too.",
    ),
    Answer("", "--max_train_steps=500 --max_train_epochs=3", "Three epochs: epochs override steps."),
    Answer("", "--min_timestep=100 --max_timestep=900", "Trains timesteps 100 to 899."),
    Answer("", "--dataset_repeats=10", "Each image ten times in an epoch, not ten epochs."),
    Answer(
        "",
        "--learning_rate=0 --train_text_encoder --learning_rate_te1=1e-6",
        "0 freezes the U-Net, and G with it: a rate that is not set is `--learning_rate`.",
    ),
)
