"""A command that is being written: what is wrong with it, field by field, as the trainer itself would say it."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.option_form import problems_by_field, values_of
from library.config.options import options_of, parse_options
from library.data.data_set_form import data_set_of, place_of_line, text_of_data_set
from library.runs.command_text import arguments_of
from library.training.run_options import OPTION_CLASSES, TrainingOptions

LEFT_OUT = frozenset({"config_file", "output_config", "dry_run", "dry_run_report", "plot_schedule", "dataset_class"})
"""Options that no form offers: they train nothing, read options from elsewhere, or name code."""
DATA_SET = "the data set"


@dataclass(frozen=True)
class Command:
    """What was written: options that differ from their defaults, as TOML has them, and the text of a data set file."""

    values: Mapping[str, Any]
    data_set: str | None = None


@dataclass(frozen=True)
class Checked:
    """A command with what is wrong with it, by field and besides; fields of the data set are "subsets.0.image_dir"."""

    command: Command
    of_field: Mapping[str, Sequence[str]] = field(default_factory=dict)
    others: Sequence[str] = ()

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.of_field and not self.others


def written(typed: Mapping[str, Any], data_set: Mapping[str, Any] | None) -> Checked:
    """Return the command that was typed into the fields, with what is no value of its field."""
    values, problems = values_of(OPTION_CLASSES, typed, LEFT_OUT)
    others, text = [], None
    if data_set is not None:
        try:
            text = text_of_data_set(data_set_of(data_set))
        except UserError as error:
            others.append(str(error))
        values.pop("dataset_config", None)
    return Checked(Command(values, text), {name: [problem] for name, problem in problems.items()}, others)


def checked(command: Command, *, is_draft: bool) -> Checked:
    """Return the command with what the trainer would refuse; of a draft, as far as that is known at once."""
    try:
        with arguments_for(command) as arguments:
            options_from(arguments, is_draft=is_draft)
            return Checked(command)
    except UserError as error:
        return _placed(command, [_without_path(problem) for problem in error.problems or [str(error)]])


def options_from(arguments: Sequence[str], *, is_draft: bool) -> TrainingOptions:
    """Return the options of a command line, with its data set read. Raise `UserError` as the trainer does."""
    options = TrainingOptions(
        *parse_options(
            OPTION_CLASSES,
            arguments,
            description="",
            spellings=TRAINER_SPELLINGS,
            conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
            heavy_conflicts=lambda *classes: TrainingOptions(*classes).heavy_conflicts(),
            is_draft=is_draft,
        )
    )
    options.subsets()
    options.sample.read_prompts()
    return options


@contextmanager
def arguments_for(command: Command) -> Iterator[list[str]]:
    """Yield the arguments of a command, with its data set in a file for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="studio-command-") as folder:
        arguments = arguments_of(command.values)
        if command.data_set is not None:
            file = Path(folder) / "dataset.toml"
            file.write_text(command.data_set, encoding="utf-8")
            arguments.append(f"--dataset_config={file}")
        yield arguments


def _without_path(problem: str) -> str:
    return re.sub(r"'[^']*studio-command-[^']*dataset\.toml'", DATA_SET, problem)


def _placed(command: Command, problems: Sequence[str]) -> Checked:
    names = {each.name for option_class in OPTION_CLASSES for each in options_of(option_class)}
    of_set: dict[str, list[str]] = {}
    rest = []
    for problem in problems:
        line = re.match(rf"{DATA_SET}, line (\d+): ", problem)
        place = place_of_line(command.data_set, int(line[1])) if line and command.data_set is not None else None
        if place is None:
            rest.append(problem)
        else:
            of_set.setdefault(place, []).append(problem[line.end() :] if line else problem)
    of_field, others = problems_by_field(rest, names, command.values)
    return Checked(command, {**of_field, **of_set}, others)
