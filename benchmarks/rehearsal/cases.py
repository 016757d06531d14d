"""What is rehearsed: every recipe of docs/performance.md, what else changes the course of a step, and the bench."""

import re
import shlex
from pathlib import Path

from benchmarks.rehearsal.rehearsed_run import Case
from benchmarks.timed_run import RECIPE
from benchmarks.training_step import VARIANTS
from library.sdxl.sizes import Size

RECIPES_PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
_RECIPE = re.compile(r"^### (\d+ GB[^\n(]*)[^\n]*\n+```\n(.*?)\n```", re.MULTILINE | re.DOTALL)
_RATE_OF_RECIPE = "8 GB"
OF_BENCH = "bench: "
"""How the names of the bench's variants begin."""


def documented_recipes() -> dict[str, tuple[str, ...]]:
    """Return the flags of each recipe of the page, by its heading."""
    page = RECIPES_PAGE.read_text(encoding="utf-8")
    return {heading.strip(): tuple(shlex.split(flags)) for heading, flags in _RECIPE.findall(page)}


def cases() -> dict[str, Case]:
    """Return every case by name: the recipes, variations of the one for 8 GB, and the variants of training_step.py."""
    recipes = documented_recipes()
    base = recipes[_RATE_OF_RECIPE]
    fused = "--fused_backward_pass"
    unfused = tuple(flag for flag in base if flag not in (fused, "--max_grad_norm=0"))
    float32 = tuple(flag for flag in base if flag != "--full_bf16")
    encoded = tuple(flag for flag in base if flag != "--cache_text_encoder_outputs")
    varied = {
        "no fused backward pass, clipping": unfused,
        "fused, clipping": (*base, "--max_grad_norm=1"),
        "kahan": (*base, "--bf16_rounding=kahan"),
        "nearest": (*base, "--bf16_rounding=nearest"),
        "float32 under autocast": float32,
        "fp16": (*(each for each in float32 if each != fused), "--mixed_precision=fp16"),
        "encoders trained": (*encoded, "--train_text_encoder"),
        "warm-up and cosine": (*base, "--lr_scheduler=cosine", "--lr_warmup_steps=1"),
        "convolutions kernel by kernel": tuple(each for each in base if not each.startswith("flatten")),
        "samples": (*base, "--sample_at_first", "--sample_prompts={folder}/prompts.txt"),
        "samples, float32 VAE": (*base, "--no_half_vae", "--sample_at_first", "--sample_prompts={folder}/prompts.txt"),
    }
    without_optimizer = base[: base.index("--optimizer_type=Adafactor")]
    varied |= {name: (*without_optimizer, f"--optimizer_type={name}") for name in ("AdamW8bit", "AdamW", "Lion")}
    varied["Prodigy"] = (*(each for each in without_optimizer if each != fused), "--optimizer_type=Prodigy")
    varied["Prodigy"] += ("--learning_rate=1",)
    found = {name: Case(name, flags) for name, flags in (recipes | varied).items()}
    for name in ("8 GB", "AdamW"):
        title = f"{name}, without Triton"
        found[title] = Case(title, (recipes | varied)[name], has_triton=False)
    mixed = (Size(1024, 1024), Size(832, 1216))
    for name, flags in VARIANTS.items():
        full = None if flags is None else (*RECIPE, *flags)
        # The first three steps of a graph are not replayed.
        num_steps = 4 if "--cuda_graphs" in (full or ()) else 2
        found[f"{OF_BENCH}{name}"] = Case(
            f"{OF_BENCH}{name}", full, num_steps=num_steps, channels_last=name == "channels_last"
        )
    found["CUDA graphs"] = Case("CUDA graphs", (*base, "--cuda_graphs"), num_steps=4)
    found["mixed buckets"] = Case("mixed buckets", (*base, "--enable_bucket"), buckets=mixed, num_steps=3)
    return found
