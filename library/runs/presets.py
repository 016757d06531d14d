"""Options to begin with: the files of `examples/`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.config_file import read_config_file, toml_value
from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import options_of
from library.training.run_options import OPTION_CLASSES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_PLACEHOLDER = "my set"
"""The folder in the examples that stands for the user's."""


@dataclass(frozen=True)
class Preset:
    """Options by name, and a data set, both as TOML has them."""

    options: Mapping[str, Any]
    data_set: Mapping[str, Any]


def preset_names() -> list[str]:
    """Return the names of the presets: what is learnt, and the memory of the GPU."""
    return [
        f"{path.parent.name}/{path.stem.removeprefix('train_')}" for path in sorted(EXAMPLES.glob("*/train_*.toml"))
    ]


def read_preset(name: str, folder: str) -> Preset:
    """Return a preset whose paths lie in `folder`. Raise `UserError` if there is none of this name."""
    if name not in preset_names():
        raise UserError(f"there is no preset '{name}'.", f"There are {', '.join(preset_names())}.")
    what, _, memory = name.partition("/")
    path = EXAMPLES / what / f"train_{memory}.toml"
    options = [each for option_class in OPTION_CLASSES for each in options_of(option_class)]
    values = read_config_file(path, options, TRAINER_SPELLINGS)
    data_set = tomllib.loads((path.parent / "dataset.toml").read_text(encoding="utf-8"))
    placed = {key: _placed(toml_value(value), folder) for key, value in values.items() if key != "dataset_config"}
    prompts = path.parent / "prompt.txt"
    if not Path(str(placed["sample_prompts"])).exists():
        placed["sample_prompts"] = str(prompts)
    return Preset(placed, _placed(data_set, folder))


def _placed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _placed(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, folder) for each in value]
    if isinstance(value, str) and (value == _PLACEHOLDER or value.startswith(f"{_PLACEHOLDER}/")):
        return f"{folder}{value.removeprefix(_PLACEHOLDER)}"
    return value
