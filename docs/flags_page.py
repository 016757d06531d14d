"""The page that lists every flag of every script, as Markdown."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docs.how_do_i import ANSWERS, TWO_READINGS
from library.config.options import Option, options_of
from library.config.spellings import Spellings

INTRODUCTION = """\
# Flags

Written by `python docs/write_flags.py` from the option classes beside the code that reads them; a test keeps it true.

Write a switch bare (`--full_bf16`) or as `--full_bf16=false`. `None` as a value means "not set". A flag may not be
abbreviated. Where a script has `--config_file`, every flag can stand in that TOML file, under its name without the
dashes; the command line overrides the file, and the file overrides the defaults below. In a file, numbers may stand in
quotes, and 0 and 1 for a switch. A `.json` file is read as what the settings window (GUI) of kohya's family saves.
"""
NEUTRAL_INTRODUCTION = """\
A refused flag is read, and skipped, where its value asks for nothing: `false`, `0`, `None`, an empty text or list. So
are the values below; for a flag that is offered they mean the same as leaving it out.
"""
OPTION_HEADINGS = ("Flag", "Value", "Default", "Meaning")


@dataclasses.dataclass(frozen=True)
class ScriptFlags:
    """One script's command line: what it is called, what it does, its option classes, old and refused spellings."""

    name: str
    description: str
    option_classes: Sequence[type]
    spellings: Spellings


def render_flags_page(scripts: Sequence[ScriptFlags]) -> str:
    """Return the page as Markdown: for each script a table for each group of flags, then old and refused spellings."""
    return "\n".join([INTRODUCTION, _how_do_i(), *(_script(script) for script in scripts)])


def _how_do_i() -> str:
    rows = [(_cell(each.question), f"`{each.flags}`" if each.flags else "", _cell(each.remark)) for each in ANSWERS]
    readings = [(f"`{each.flags}`", _cell(each.remark)) for each in TWO_READINGS]
    return "\n".join(
        [
            "## How do I ...\n",
            _table("... of `sdxl_train.py`", "Flags", "Remark", rows=rows),
            "### Numbers that could be read in two ways\n",
            _table("Flags", "Meaning", rows=readings),
        ]
    )


def _script(script: ScriptFlags) -> str:
    parts = [f"## {script.name}\n", f"{script.description}\n"]
    for option_class in script.option_classes:
        parts += [
            f"### {_group_name(option_class)}\n",
            _table(*OPTION_HEADINGS, rows=map(_row, options_of(option_class))),
        ]
    replaced, refused = script.spellings.replaced, script.spellings.refused
    if replaced:
        rows = [(f"`{old}`", f"`{new}`") for old, new in sorted(replaced.items())]
        parts += ["### Other spellings\n", _table("Written", "Read as", rows=rows)]
    if refused:
        rows = [(f"`{flag}`", _cell(reason)) for flag, reason in sorted(refused.items())]
        parts += ["### Refused\n", _table("Flag", "Why, and what to do", rows=rows)]
    neutral = {**script.spellings.neutral_refused, **script.spellings.neutral}
    if neutral:
        rows = [(f"`{flag}`", ", ".join(map(_written, values))) for flag, values in sorted(neutral.items())]
        parts += ["### Values that ask for nothing\n", NEUTRAL_INTRODUCTION, _table("Flag", "Values", rows=rows)]
    return "\n".join(parts)


def _group_name(option_class: Any) -> str:
    return option_class._argument_group_name


def _row(option: Option) -> tuple[str, str, str, str]:
    spellings = ", ".join(f"`{name}`" for name in (option.flag, *option.aliases))
    default = "required" if option.is_positional else _value(option.default)
    return spellings, _values(option), default, _cell(option.help)


def _values(option: Option) -> str:
    """Return the possible values in words."""
    if option.is_switch:
        return "switch"
    kind = option.expected
    if option.choices:
        kind = ", ".join(f"`{choice}`" for choice in option.choices)
    if option.is_list:
        return f"any number of: {kind}"
    return f"{kind} or `None`" if option.is_optional else kind


def _value(value: Any) -> str:
    if value in (None, "", []):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


def _written(value: str) -> str:
    return f"`{value}`" if value else "an empty text"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _table(*headings: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
