"""Options as a form: what each field takes and means, and what was typed into it as values."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from library.config.config_file import toml_value
from library.config.errors import UserError
from library.config.options import Option, options_of

_UNITS = {
    r"(^|_)n_minutes$": "minutes",
    r"(^|_)n_epochs(_state)?$|^max_train_epochs$": "epochs",
    r"(?<!accumulation)(_|^)steps?$|_n_steps(_state)?$|^stop_training_te": "steps",
    r"_reso$|_reso_steps$|^resolution$": "pixels",
    r"_rate(_[lg])?$(?<!learning_rate)": "0 to 1",
    r"^ddp_timeout$": "minutes",
}


def form_of(option_classes: Sequence[type], left_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the groups of flags as JSON: of each field its name, kind, default, choices, bounds, unit and meaning.

    Positional arguments, secrets and the options in `left_out` are not among them.
    """
    groups = []
    for option_class in option_classes:
        fields = [_field(each) for each in options_of(option_class) if _is_offered(each, left_out)]
        if fields:
            groups.append({"title": getattr(option_class, "_argument_group_name", ""), "fields": fields})
    return groups


def values_of(
    option_classes: Sequence[type], typed: Mapping[str, Any], left_out: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that differ from their defaults, as TOML has them, and what is wrong, both by field.

    `typed` has a text for each field, true or false for a switch, and a list of texts for a list. An empty text leaves
    the default.
    """
    options = {each.name: each for option_class in option_classes for each in options_of(option_class)}
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, text in typed.items():
        option = options.get(name)
        if option is None or not _is_offered(option, left_out):
            problems[name] = f"there is no field '{name}'."
            continue
        try:
            value = _value(option, text)
        except UserError as error:
            problems[name] = str(error)
            continue
        problem = None if option.is_list else option.bound_problem(value)
        if problem is not None:
            problems[name] = problem
        elif value != option.default:
            values[name] = toml_value(value)
    return values, problems


def typed_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what would be typed for values as TOML has them."""
    return {name: _typed(value) for name, value in values.items()}


def problems_by_field(
    problems: Sequence[str], names: Collection[str], changed: Collection[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return sentences by the fields that they name, and those that name none.

    A sentence stands at the first field that it names, and at the others among `changed`, those that the user has set.
    """
    of_field: dict[str, list[str]] = {}
    of_none = []
    for problem in problems:
        named = [name for name in dict.fromkeys(re.findall(r"--([a-z0-9_]+)", problem)) if name in names]
        for name in [each for place, each in enumerate(named) if place == 0 or each in changed]:
            of_field.setdefault(name, []).append(problem)
        if not named:
            of_none.append(problem)
    return of_field, of_none


def _is_offered(option: Option, left_out: Collection[str]) -> bool:
    return not (option.is_positional or option.is_secret or option.name in left_out)


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [str(each) for each in value]
    return value if isinstance(value, bool) else str(value)


def _value(option: Option, typed: Any) -> Any:
    if option.is_list:
        texts = typed if isinstance(typed, list) else [typed]
        if not all(isinstance(each, str) for each in texts):
            raise option.refusal(typed)
        values = [option.from_text(each) for each in texts if each]
        return values or option.default
    if isinstance(typed, bool) and option.is_switch:
        return typed
    if not isinstance(typed, str):
        raise option.refusal(typed)
    return option.from_text(typed) if typed else option.default


def _field(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "kind": "switch" if option.is_switch else "list" if option.is_list else "choice" if option.choices else "text",
        "expects": ", ".join(_expected(option)),
        "choices": [str(each) for each in option.choices],
        "default": None if option.default is None else _typed(toml_value(option.default)),
        "help": option.help,
    }


def _expected(option: Option) -> Iterator[str]:
    yield option.expected
    if option.least is not None and option.most is not None and option.most <= 1:
        yield f"{option.least:g} to {option.most:g}"
    elif option.least is not None:
        yield f"{option.least:g} or more"
    unit = next((unit for pattern, unit in _UNITS.items() if re.search(pattern, option.name)), None)
    if unit is not None and option.value_type is not bool:
        yield unit
