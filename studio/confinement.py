"""Which options a run that is started from the page may have: its paths stay within the opened folders."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from library.config.errors import UserError, error_of_problems
from library.data.dataset_schema import read_tables

_WRITTEN = frozenset({"output_dir", "logging_dir", "console_log_file", "dry_run_report", "plot_schedule"})
_READ = frozenset(
    {
        *("train_data_dir", "in_json", "reg_data_dir", "dataset_config", "conditioning_data_dir", "sample_prompts"),
        *("protected_tags", "protected_tags_l", "protected_tags_g", "log_tracker_config", "config_file"),
        *("image_dir", "metadata_file"),  # of a data set file
    }
)
_READ_OR_NAMES = frozenset({"pretrained_model_name_or_path", "vae", "resume", "metadata_thumbnail"})
"""Paths, or something else: a name on the hub, "latest", a data URL."""
_PARTS_OF_PATHS = frozenset({"log_prefix", "log_tracker_name", "output_name"})
_NOT_FROM_A_PAGE = {
    "dataset_class": "names code, which a page must not run. Start such a run by hand.",
    "wandb_api_key": "is a secret: set WANDB_API_KEY before the studio starts.",
    "huggingface_token": "is a secret: set HF_TOKEN, or log in with `hf auth login`, before the studio starts.",
}


class Places(Protocol):
    """What says which paths are within the opened folders."""

    def may_read(self, path: Path) -> bool:
        """Whether a path may be read."""

    def may_write(self, path: Path) -> bool:
        """Whether a path may be written."""


def problems_of_paths(options: Mapping[str, Any], places: Places) -> Iterator[tuple[str, str]]:
    """Yield the name of each option that a run must not have, and a sentence that says why."""
    for name, value in options.items():
        problem = None if value in (None, "", "None") else _problem(name, str(value), places)
        if problem is None and name == "dataset_config" and value:
            problem = _problem_within(Path(str(value)), places)
        if problem is not None:
            yield name, f"--{name} {problem}"


def require_confined(options: Mapping[str, Any], places: Places) -> None:
    """Raise `UserError` if an option leads out of the opened folders."""
    problems = [problem for _, problem in problems_of_paths(options, places)]
    if problems:
        raise error_of_problems(problems)


def require_confined_data_set(document: Mapping[str, Any], places: Places) -> None:
    """Raise `UserError` if a data set, as TOML has it, names a path outside of the opened folders."""
    tables = [document.get("general", {}), *document.get("datasets", [])]
    tables += [subset for table in document.get("datasets", []) for subset in table.get("subsets", [])]
    _require_confined_tables(tables, places)


def _require_confined_tables(tables: Iterable[Mapping[str, Any]], places: Places, folder: Path = Path()) -> None:
    """Raise `UserError` if a table names a path outside, seen from the current folder or from `folder`."""
    for table in tables:
        own = {key: value for key, value in table.items() if key in _READ}
        for start in {Path(), folder}:
            located = {key: str(start / str(value)) for key, value in own.items() if value}
            for name, problem in problems_of_paths(located, places):
                raise UserError(f"{name}{problem.removeprefix(f'--{name}')}")


def _problem_within(file: Path, places: Places) -> str | None:
    """Return what a data set file names outside of the opened folders; one that cannot be read names nothing."""
    try:
        tables = read_tables(file)
    except UserError:
        return None  # which the trainer explains, before it reads any image
    datasets = [table for dataset, subsets in tables.datasets for table in (dataset, *subsets)]
    try:
        _require_confined_tables([tables.general, *datasets], places, file.parent)
    except UserError as error:
        return f"names a folder that may not be read: {error}"
    return None


def _problem(name: str, value: str, places: Places) -> str | None:
    if name in _NOT_FROM_A_PAGE:
        return _NOT_FROM_A_PAGE[name]
    if name in _PARTS_OF_PATHS:
        is_within = not Path(value).is_absolute() and ".." not in value.replace("\\", "/").split("/")
        return None if is_within else f"is '{value}', which leads to another folder."
    if name in _WRITTEN and not places.may_write(Path(value)):
        return f"is '{value}', outside of the folders of --run_dirs: the studio lets nothing write there."
    is_path = name in _READ or (name in _READ_OR_NAMES and _leads_somewhere(value))
    if is_path and not places.may_read(Path(value)):
        return f"is '{value}', outside of the opened folders. Start the studio with --model_dirs or --run_dirs for it."
    return None


def _leads_somewhere(value: str) -> bool:
    """Return whether a value that may be a name is a path."""
    if value.startswith("data:"):
        return False
    try:
        return Path(value).is_absolute() or ".." in Path(value).parts or Path(value).exists()
    except (OSError, ValueError):  # too long for a path
        return True
