"""Continue from a state: which one, and what has changed since it was saved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from typing import Any, ClassVar

from library.config.errors import UserError, listed
from library.config.options import option
from library.training.progress import Setting

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy")

_DECIDE_THE_COURSE = frozenset(
    {
        *("train_batch_size", "gradient_accumulation_steps", "num_processes", "dataset_repeats", "flip_aug", "seed"),
        *("max_token_length", "pretrained_model_name_or_path", "vae", "train_text_encoder", "optimizer_type"),
        *("mixed_precision", "full_bf16", "bf16_rounding", "legacy_text_projection", "legacy_crop_coords"),
        "transposed_text_projection",
    }
)
"""Options that change the rest of the run."""

_ABOUT_RESUMING = frozenset({"resume", "resume_anyway", "console_log_level", "console_log_file", "console_log_simple"})


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


def flat_options(options: Any, *, num_processes: int) -> dict[str, str]:
    """Return every option by its name, as text, and the number of processes: what runs are compared by."""
    flat = {
        field.name: str(getattr(group, field.name))
        for group in vars(options).values()
        if is_dataclass(group)
        for field in fields(group)
    }
    return flat | {"num_processes": str(num_processes)}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {library: version(library) for library in _LIBRARIES}


def check_options(then: Setting, now: Setting, *, anyway: bool) -> list[str]:
    """Return which options and library versions have changed since a state was saved, a sentence each.

    Raise `UserError` for those that make the continuation another run, unless `anyway`.
    """
    harmless = [
        f"{library}: {before} then, {now.versions.get(library)} now"
        for library, before in then.versions.items()
        if now.versions.get(library) != before
    ]
    serious: list[str] = []
    for name, value in now.options.items():
        before = then.options.get(name, value)
        if before != value and name not in _ABOUT_RESUMING:
            (serious if name in _DECIDE_THE_COURSE else harmless).append(f"--{name}: {before} then, {value} now")
    _refuse(serious, anyway=anyway)
    return harmless + serious


def check_images(then: Mapping[str, str], now: Mapping[str, str], *, anyway: bool) -> list[str]:
    """Return which images have changed since a state was saved, by their fingerprints; as `check_options`."""
    changes = list(_image_changes(then, now))
    _refuse(changes, anyway=anyway)
    return changes


def _refuse(serious: list[str], *, anyway: bool) -> None:
    if serious and not anyway:
        raise UserError(
            f"since the state was saved this has changed: {'; '.join(serious)}.",
            "Undo the change, or continue with --resume_anyway.",
        )


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
