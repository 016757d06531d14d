"""Routes of a command that is written on the page: its form, presets, what is wrong with it, its summary, its start."""

from pathlib import Path
from typing import Any

from starlette.requests import Request

from library.config.errors import UserError, error_of_problems
from library.config.option_form import form_of, typed_of
from library.data.data_set_form import data_set_form, data_set_of, typed_of_data_set
from library.runs.command_check import LEFT_OUT, Checked, Command, checked, written
from library.runs.command_text import shown_commands, toml_of
from library.runs.control import options_of_run
from library.runs.folders import run_id
from library.runs.launch import launch
from library.runs.presets import preset_names, read_preset
from library.training.run_options import OPTION_CLASSES
from studio.answers import Body
from studio.confinement import problems_of_paths, require_confined_data_set
from studio.runs import Runs
from studio.workers import Worker

_SECONDS_TO_CHECK, _SECONDS_WITH_TORCH = 60.0, 600.0


class CommandRoutes:
    """Answers about a command; the trainer's own code checks it, in processes beside the server."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._checking, self._summing = Worker(), Worker()

    def close(self) -> None:
        """End the processes."""
        self._checking.close()
        self._summing.close()

    def form(self, request: Request, body: Body) -> Any:
        """The fields of all options by group, those of a data set, and the presets."""
        return {
            "groups": form_of(OPTION_CLASSES, LEFT_OUT),
            "data_set": data_set_form(),
            "presets": preset_names(),
            "roots": [str(root) for root in self._runs.folders.roots],
        }

    def preset(self, request: Request, body: Body) -> Any:
        """What a preset puts into the fields; its paths lie in the first folder of runs."""
        preset = read_preset(request.query_params.get("name", ""), str(self._runs.folders.roots[0]))
        return {"fields": typed_of(preset.options), "data_set": typed_of_data_set(preset.data_set)}

    def of_run(self, request: Request, body: Body) -> Any:
        """What the options of a run put into the fields."""
        options = options_of_run(self._runs.run(request.path_params["run"]))
        return {
            "fields": typed_of({name: each for name, each in options.items() if name not in LEFT_OUT}),
            "data_set": None,
        }

    def check(self, request: Request, body: Body) -> Any:
        """What was typed as TOML and as a command, and what is wrong with it as far as that is known at once."""
        found = self._checked(body, is_draft=True)
        values = found.command.values
        shown = values if found.command.data_set is None else {**values, "dataset_config": "dataset.toml"}
        return {
            "problems": found.of_field,
            "others": found.others,
            "is_right": found.is_right,
            "toml": toml_of(values),
            "data_set": found.command.data_set,
            "changed": list(values),
            **shown_commands(shown),
        }

    def summary(self, request: Request, body: Body) -> Any:
        """What the command would train."""
        found = self._checked(body, is_draft=True)
        if not found.is_right:
            raise UserError("the command has to be right before it can be summed up.")
        return {"parts": self._summing.run(_summary, found.command, seconds=_SECONDS_WITH_TORCH)}

    def start(self, request: Request, body: Body) -> Any:
        """Start the run of a command that is right."""
        found = self._checked(body, is_draft=False)
        if not found.is_right:
            raise error_of_problems([*found.others, *(each for of in found.of_field.values() for each in of)])
        output_dir = Path(found.command.values["output_dir"])
        self._runs.require_writable(output_dir, "--output_dir")
        made = launch(output_dir, found.command.values, found.command.data_set)
        self._runs.folders.add(output_dir)
        return {"id": run_id(output_dir, made.name)}

    def _checked(self, body: Body, *, is_draft: bool) -> Checked:
        """Return what was typed with what is wrong: no values, paths outside, and what the trainer says."""
        typed, data_set = body.get("fields"), body.get("data_set")
        if not isinstance(typed, dict) or not isinstance(data_set, dict | None):
            raise UserError("expected the fields of a command.")
        found = written(typed, data_set)
        of_field = dict(found.of_field)
        for name, problem in problems_of_paths(found.command.values, self._runs):
            of_field.setdefault(name, [problem])
        others = list(found.others)
        if data_set is not None and not others:
            try:
                require_confined_data_set(data_set_of(data_set), self._runs)
            except UserError as error:
                others.append(f"the data set: {error}")
        if of_field or others:
            return Checked(found.command, of_field, others)
        worker, seconds = (self._checking, _SECONDS_TO_CHECK) if is_draft else (self._summing, _SECONDS_WITH_TORCH)
        result = worker.run(checked, found.command, is_draft=is_draft, seconds=seconds)
        assert isinstance(result, Checked)
        return result


def _summary(command: Command) -> list[tuple[str, list[str]]]:
    from library.runs.command_summary import command_summary  # and torch, which the server need not have

    return command_summary(command)
