"""Options as a command: as TOML, as arguments, and as a line to copy."""

import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

from library.config.options import options_of
from library.training.run_options import OPTION_CLASSES

SCRIPT = "sdxl_train.py"


def toml_of(values: Mapping[str, Any]) -> str:
    """Return options, by name and as TOML has them, as the text of a `--config_file`: a section for each group."""
    import tomli_w

    sections = {}
    for option_class in OPTION_CLASSES:
        own = {each.name: values[each.name] for each in options_of(option_class) if each.name in values}
        if own:
            sections[getattr(option_class, "_argument_group_name", "Options")] = own
    return tomli_w.dumps(sections)


def arguments_of(values: Mapping[str, Any]) -> list[str]:
    """Return options as arguments of sdxl_train.py, each value in one piece whatever it holds."""
    arguments: list[str] = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={str(value).lower() if value is False else value}")
    return arguments


def shown_commands(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the command to copy into a shell of Linux and macOS, and into one of Windows."""
    command = ["python", SCRIPT, *arguments_of(values)]
    return {"posix": shlex.join(command), "windows": subprocess.list2cmdline(command)}
