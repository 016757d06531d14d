"""The flags of logs: where they go, and how their trackers are started."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from library.config.config_file import parse_toml
from library.config.errors import UserError, listed, nearest
from library.config.file_names import TIME_FORMAT, name_problem, require_writable_name, text_problem
from library.config.options import option

_TRACKER_NAME = "finetuning"


@dataclass(frozen=True)
class TrackingOptions:
    """Logs."""

    _argument_group_name: ClassVar[str] = "Logs"

    logging_dir: Path | None = option(None, "Folder for logs. Each run creates a subfolder named by date and time.")
    log_with: str | None = option(
        None,
        "Log to this tracker. --logging_dir alone selects tensorboard.",
        choices=("tensorboard", "wandb", "all", None),
    )
    log_prefix: str | None = option(
        None, "Prefix of the name of the run's log folder. A / in it makes a folder below --logging_dir."
    )
    log_tracker_name: str | None = option(None, "Name of the tracker. Default: finetuning.")
    log_config: bool = option(False, "Log the options of the run, without secrets and folders.")
    log_tracker_config: Path | None = option(
        None,
        "TOML file with a section for each tracker: arguments of wandb.init in [wandb], of TensorBoard's SummaryWriter "
        "in [tensorboard].",
    )
    wandb_run_name: str | None = option(None, "Name of the run in wandb. Other trackers have none.")
    wandb_api_key: str | None = option(
        None,
        "Key of the account in wandb. It is written to no file, but other users of the machine can see it in the list "
        "of processes: WANDB_API_KEY or 'wandb login' keep it from them.",
        secret=True,
    )

    @property
    def trackers(self) -> list[str]:
        """The names of accelerate's trackers."""
        if self.log_with == "all":
            return ["tensorboard", "wandb"]
        if self.log_with is not None:
            return [self.log_with]
        return ["tensorboard"] if self.logging_dir is not None else []

    def run_folder(self, now: datetime) -> Path | None:
        """Return the log folder of a run that starts `now`."""
        return None if self.logging_dir is None else self.logging_dir / f"{self.log_prefix or ''}{now:{TIME_FORMAT}}"

    @property
    def tracker_name(self) -> str:
        """The name of the tracker, and of its folder in that of the run."""
        return _TRACKER_NAME if self.log_tracker_name is None else self.log_tracker_name

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if "tensorboard" in self.trackers and self.logging_dir is None:
            yield "--log_with tensorboard needs --logging_dir."
        if "wandb" in self.trackers and find_spec("wandb") is None:
            yield "--log_with wandb: the package is not installed; pip install wandb."
        if self.logging_dir is None and self.log_prefix is not None:
            yield "--log_prefix needs --logging_dir."
        for name in ("log_tracker_name", "log_config", "log_tracker_config"):
            if not self.trackers and getattr(self, name) not in (None, False):
                yield f"--{name} needs --logging_dir or --log_with."
        if self.wandb_api_key is not None and "wandb" not in self.trackers:
            yield "--wandb_api_key needs --log_with=wandb."
        yield from self._name_problems()
        try:
            self.tracker_settings()
        except UserError as error:
            yield str(error)

    def heavy_problems(self) -> Iterator[str]:
        """Yield why logs cannot be written under these names: they are tried."""
        yield from self._unknown_arguments()
        folder = self.run_folder(datetime.now())
        if folder is None:
            return
        try:
            require_writable_name(folder.parent, folder.name, "--log_prefix, with the time of the run,")
            require_writable_name(folder, self.tracker_name, "--log_tracker_name")
        except UserError as error:
            yield str(error)

    def _name_problems(self) -> Iterator[str]:
        parts = f"{self.log_prefix or ''}{datetime.now():{TIME_FORMAT}}".split("/")
        if problem := next(filter(None, map(name_problem, parts)), None):
            yield f"--log_prefix is '{self.log_prefix}': {problem}. Logs are written below --logging_dir."
        if problem := name_problem(self.tracker_name):
            yield f"--log_tracker_name is '{self.log_tracker_name}': {problem}. Choose another name."
        if self.wandb_run_name is not None and (problem := text_problem(self.wandb_run_name)):
            yield f"--wandb_run_name: {problem}. Correct the text."

    def tracker_settings(self) -> dict[str, dict[str, Any]]:
        """Return the arguments with which each tracker is started. Raise `UserError` for a file that cannot be used."""
        path = self.log_tracker_config
        settings: dict[str, dict[str, Any]] = {}
        if path is not None:
            settings = _read_settings(path)
            for name in settings:
                if name not in _FIXED_ARGUMENTS:
                    raise UserError(
                        f"--log_tracker_config: '{path}' has a section '{name}'; trackers are tensorboard, wandb.",
                        nearest(name, _FIXED_ARGUMENTS) or "Remove it.",
                    )
        if self.wandb_run_name is not None:
            settings["wandb"] = {**settings.get("wandb", {}), "name": self.wandb_run_name}
        return settings

    def _unknown_arguments(self) -> Iterator[str]:
        """Yield which arguments a tracker does not take, or takes from a flag."""
        for name, arguments in self.tracker_settings().items():
            if name not in self.trackers:
                continue
            known, fixed = _arguments_of(name), _FIXED_ARGUMENTS[name]
            for argument in arguments:
                if argument in fixed:
                    yield f"--log_tracker_config: '{argument}' of {name} is set by {fixed[argument]}; remove it."
                elif argument not in known:
                    advice = nearest(argument, known) or "Remove it."
                    yield f"--log_tracker_config: {name} takes no '{argument}'. {advice}"


_FIXED_ARGUMENTS = {
    "tensorboard": {"log_dir": "--logging_dir and --log_tracker_name", "purge_step": "--resume"},
    "wandb": {"project": "--log_tracker_name"},
}
"""The trackers, and those of their arguments that come from flags."""


def _arguments_of(tracker: str) -> list[str]:
    if tracker == "wandb":
        return list(inspect.signature(import_module("wandb").init).parameters)
    from torch.utils.tensorboard import SummaryWriter

    return [name for name in inspect.signature(SummaryWriter.__init__).parameters if name != "self"]


def _read_settings(path: Path) -> dict[str, dict[str, Any]]:
    try:
        sections = parse_toml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"--log_tracker_config: cannot read '{path}': {error.strerror or error}.", "Check the path."
        ) from error
    except ValueError as error:
        raise UserError(
            f"--log_tracker_config: '{path}' is not valid TOML: {error}.", "Write sections such as [wandb]."
        ) from error
    loose = [name for name, section in sections.items() if not isinstance(section, dict)]
    if loose:
        raise UserError(
            f"--log_tracker_config: in '{path}', {listed(loose)} stands in no section.", "Put it below [wandb]."
        )
    return sections
