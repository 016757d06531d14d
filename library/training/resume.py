"""Continue from a state: which one, and what has changed since it was saved."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from typing import Any, ClassVar

from library.captions.options import CaptionOptions
from library.captions.rules import CaptionRules, PairRules, described_rules
from library.config.errors import UserError, listed
from library.config.options import is_secret, option
from library.data.subsets import SUBSET_MARK
from library.training.progress import Setting

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy")

_DECIDE_THE_COURSE = frozenset(
    {
        *("train_batch_size", "gradient_accumulation_steps", "num_processes", "dataset_repeats", "flip_aug", "seed"),
        *("pretrained_model_name_or_path", "vae", "train_text_encoder", "optimizer_type"),
        *("color_aug", "random_crop", "face_crop_aug_range", "resize_interpolation", "masked_loss", "alpha_mask"),
        *("stop_training_te1", "stop_training_te2"),
        *("v_parameterization", "flow_matching", "noise_prediction", "zero_terminal_snr"),
        *("loss_weighting", "edm2_channels"),
        *("mixed_precision", "full_bf16", "bf16_rounding", "legacy_text_projection", "legacy_crop_coords"),
        *("transposed_text_projection", "one_caption", "validation_seed", "validation_timesteps"),
    }
)
"""Options that change the rest of the run, beside all rules of captions."""

_SPLIT = ("gradient_accumulation_steps", "num_processes")
"""What says how many micro-batches a step has."""

_CAPTION_RULES = described_rules(PairRules()).keys()
_ABOUT_RESUMING = frozenset(
    {
        *("resume", "resume_anyway", "update_captions", "console_log_level", "console_log_file", "console_log_simple"),
        *("resume_from_huggingface", "async_upload"),
    }
)


@dataclass(frozen=True)
class ResumeOptions:
    """Continuing from a state."""

    _argument_group_name: ClassVar[str] = "Resuming"

    resume: str | None = option(
        None,
        "Continue from a saved state: its folder, or 'latest' for the newest one of --output_name in --output_dir.",
    )
    resume_anyway: bool = option(
        False, "Continue even if images, captions or options that change the run differ from those of the state."
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.resume_anyway and self.resume is None:
            yield "--resume_anyway needs --resume."


def flat_options(options: Any, subsets: Mapping[str, str], *, num_processes: int) -> dict[str, str]:
    """Return every option but secrets by its name, as text, and the number of processes: what runs are compared by.

    Of captions it is the rules that count, not which flags they come from: they are among the settings of `subsets`,
    as `described_subsets` returns them.
    """
    flat = {
        field.name: str(getattr(group, field.name))
        for group in vars(options).values()
        if is_dataclass(group) and not isinstance(group, CaptionOptions)
        for field in fields(group)
        if not is_secret(field)
    }
    return {**flat, **subsets} | {"num_processes": str(num_processes)}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {library: version(library) for library in _LIBRARIES}


def check_options(then: Setting, now: Setting, *, anyway: bool, splits_alike: bool = True) -> list[str]:
    """Return which options and library versions have changed since a state was saved, a sentence each.

    Raise `UserError` for those that make the continuation another run, unless `anyway`. With `splits_alike` it is the
    same run however many processes share the micro-batches of a step, if their number is the same.
    """
    harmless = [
        f"{library}: {before} then, {now.versions.get(library)} now"
        for library, before in then.versions.items()
        if now.versions.get(library) != before
    ]
    serious: list[str] = []
    saved = _with_caption_rules(then.options)
    same_split = _batches_of_step(saved) == _batches_of_step(now.options)
    for name, value in now.options.items():
        before = saved.get(name, value)
        if before != value and name not in _ABOUT_RESUMING:
            is_serious = _decides(name) and not (name in _SPLIT and splits_alike and same_split)
            (serious if is_serious else harmless).append(f"--{name}: {before} then, {value} now")
    _refuse(serious, anyway=anyway)
    return harmless + serious


def check_images(then: Mapping[str, str], now: Mapping[str, str], *, anyway: bool) -> list[str]:
    """Return which images have changed since a state was saved, by their fingerprints; as `check_options`."""
    changes = list(_image_changes(then, now))
    _refuse(changes, anyway=anyway)
    return changes


def check_validation(then: Mapping[str, str], now: Mapping[str, str], *, anyway: bool) -> list[str]:
    """Return how the validation set has changed since a state was saved; as `check_options`.

    A run that had none may get one: curves that do not exist cannot break.
    """
    changes = [f"of the validation set, {change}" for change in _image_changes(then, now)] if then else []
    _refuse(changes, anyway=anyway)
    return changes


def _refuse(serious: list[str], *, anyway: bool) -> None:
    if serious and not anyway:
        raise UserError(
            f"since the state was saved this has changed: {'; '.join(serious)}.",
            "Undo the change, or continue with --resume_anyway."
            if not any(change.startswith("--num_processes") for change in serious)
            else "Set --gradient_accumulation_steps so that times the number of processes it is as many as then, or "
            "continue with --resume_anyway.",
        )


def _decides(name: str) -> bool:
    return name in _DECIDE_THE_COURSE or name in _CAPTION_RULES or name.startswith(SUBSET_MARK)


def _batches_of_step(options: Mapping[str, str]) -> int:
    """Return how many micro-batches a step has in all processes."""
    return math.prod(int(options.get(name, "1")) for name in _SPLIT)


def _with_caption_rules(options: Mapping[str, str]) -> Mapping[str, str]:
    """Return the options of a state; one from before there were caption rules changed nothing but the length."""
    if options.keys() >= _CAPTION_RULES:
        return options
    length = options.get("max_token_length", "None")
    rules = CaptionRules() if length == "None" else CaptionRules(max_token_length=int(length))
    return {**described_rules(PairRules(rules, rules)), **options}


def _image_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    changed = [key for key, fingerprint in before.items() if now.get(key, fingerprint) != fingerprint]
    for what, keys in (
        ("removed", [key for key in before if key not in now]),
        ("added", [key for key in now if key not in before]),
        ("with another image, bucket, caption or kind of latents", changed),
    ):
        if keys:
            yield f"{len(keys)} images {what}: {listed(keys)}"
    if before.keys() == now.keys() and list(before) != list(now):
        yield "the images are in another order in the metadata"
