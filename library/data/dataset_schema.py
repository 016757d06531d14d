"""The keys of a data set file: which there are, at which level, and what values they take."""

import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from library.captions.options import CaptionOptions, level_problems
from library.config.errors import UserError, error_of_problems, nearest
from library.config.magnitudes import HEAVIEST
from library.data.strict_json import parse_json, read_utf8
from library.images.augmentation import RESIZE_INTERPOLATIONS

Check = Callable[[Any], bool]


class Value(NamedTuple):
    """What a key takes: the test of a value, and the words for what is expected."""

    is_right: Check
    expected: str


def _of(*types: type) -> Check:
    return lambda value: type(value) in types


def _pair_of(kind: type) -> Check:
    return lambda value: isinstance(value, list) and len(value) == 2 and all(type(each) is kind for each in value)


_FLAG = Value(_of(bool), "true or false")
_TEXT = Value(_of(str), "a text")
_COUNT = Value(lambda value: type(value) in (int, bool) and value >= 1, "a whole number of 1 or more")
_WHOLE = Value(_of(int, bool), "a whole number")
_COUNTED_FROM_0 = Value(lambda value: type(value) in (int, bool) and value >= 0, "a whole number of 0 or more")
_WEIGHT = Value(lambda value: type(value) in (int, float) and 0 <= value <= HEAVIEST, f"a number from 0 to {HEAVIEST}")

_DATASET_KEYS: Mapping[str, Value] = {
    "resolution": Value(lambda value: _of(int)(value) or _pair_of(int)(value), "a whole number or [width, height]"),
    "batch_size": _COUNT,
    "enable_bucket": _FLAG,
    "min_bucket_reso": _COUNT,
    "max_bucket_reso": _COUNT,
    "bucket_reso_steps": _COUNT,
    "bucket_no_upscale": _FLAG,
    "network_multiplier": Value(_of(int, float), "a number"),
}
_SUBSET_KEYS: Mapping[str, Value] = {
    "validation_seed": _COUNTED_FROM_0,
    "validation_split": Value(
        lambda value: type(value) is float and 0 <= value <= 1, "a number with a decimal point, from 0.0 to 1.0"
    ),
    "num_repeats": _COUNT,
    "flip_aug": _FLAG,
    "color_aug": _FLAG,
    "random_crop": _FLAG,
    "face_crop_aug_range": Value(_pair_of(float), "[least, most] with decimal points"),
    "resize_interpolation": Value(
        lambda value: value in RESIZE_INTERPOLATIONS, f"one of {', '.join(RESIZE_INTERPOLATIONS)}"
    ),
    "class_tokens": _TEXT,
    "cache_info": _FLAG,
    "custom_attributes": Value(_of(dict), "a table"),
    "loss_weight": _WEIGHT,
}
_SUBSET_ONLY_KEYS: Mapping[str, Value] = {
    "image_dir": _TEXT,
    "metadata_file": _TEXT,
    "is_reg": _FLAG,
    "alpha_mask": _FLAG,
    "conditioning_data_dir": _TEXT,
}

WITHOUT_EFFECT: Mapping[str, str] = {
    "custom_attributes": "no other program reads the data set",
    "network_multiplier": "it belongs to LoRA training",
}


def _caption_keys() -> dict[str, Value]:
    hints = typing.get_type_hints(CaptionOptions)
    keys = {}
    for field in fields(CaptionOptions):
        kinds = set(typing.get_args(hints[field.name])) - {type(None)}
        choices = field.metadata.get("choices")
        if choices:
            keys[field.name] = Value(choices.__contains__, f"one of {', '.join(map(str, choices))}")
        elif kinds == {bool}:
            keys[field.name] = _FLAG
        elif kinds == {int}:
            keys[field.name] = _WHOLE
        elif float in kinds:
            keys[field.name] = Value(_of(int, float), "a number")
        else:
            keys[field.name] = _TEXT
    return keys


_ASCENDING = {**_SUBSET_KEYS, **_caption_keys()}
KEYS: Mapping[str, Mapping[str, Value]] = {
    "general": {**_DATASET_KEYS, **_ASCENDING},
    "datasets": {**_DATASET_KEYS, **_ASCENDING},
    "subsets": {**_ASCENDING, **_SUBSET_ONLY_KEYS},
}


@dataclass(frozen=True)
class Table:
    """One table of the file: its name, what it says, the line of each key, and what is at fault with it."""

    kind: str
    number: int
    values: dict[str, Any]

    def problems(self, path: Path, lines: Mapping[tuple[str, int, str], int]) -> Iterator[str]:
        """Yield a sentence for each key that is unknown or of a wrong value."""
        known, right = KEYS[self.kind], {}
        for key, value in self.values.items():
            line = lines.get((self.kind, self.number, key))
            where = f"'{path}'" + ("" if line is None else f", line {line}")
            if key not in known:
                suggestion = nearest(key, known)
                others = [kind for kind, keys in KEYS.items() if key in keys]
                place = f"; it belongs to {' or '.join(map(_header, others))}" if others else ""
                yield f"{where}: {_header(self.kind)} has no key '{key}'{place}. {suggestion}".rstrip()
            elif not known[key].is_right(value):
                yield f"{where}: {key} is {value!r}, expected {known[key].expected}."
            else:
                right[key] = value
        for problem in level_problems({key: converted(key, value) for key, value in right.items()}):
            name = re.match(r"\w+", problem)
            line = lines.get((self.kind, self.number, name[0])) if name else None
            yield f"'{path}'{'' if line is None else f', line {line}'}: {problem}"


class Tables(NamedTuple):
    """The tables of a data set file: what holds for all, and each data set with its subsets."""

    general: dict[str, Any]
    datasets: list[tuple[dict[str, Any], list[dict[str, Any]]]]


def converted(key: str, value: Any) -> Any:
    """Return a value as options hold it: 1 for true where a number is expected, a path of protected tags."""
    if key.startswith("protected_tags"):
        return Path(value)
    return int(value) if value in (True, False) and KEYS["general"].get(key) in (_COUNT, _WHOLE) else value


def read_tables(path: Path) -> Tables:
    """Return what a file, TOML or JSON by its suffix, says. Raise `UserError` that lists every fault of it."""
    content, lines = _parsed(path)
    known = ("general", "datasets")
    problems = [
        f"'{path}': there is no table '{name}'. {nearest(name, known)}".rstrip()
        for name in content
        if name not in known
    ]
    general, datasets = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict) or not _is_tables(datasets):
        raise UserError(f"'{path}': expected one table [general] and tables [[datasets]].", "Correct the headers.")
    if not datasets:
        problems.append(f"'{path}': there are no [[datasets]]. Name at least one, with its [[datasets.subsets]].")
    tables, made = [Table("general", 0, general)], Tables(general, [])
    num_subsets = 0
    for number, dataset in enumerate(datasets):
        said = {key: value for key, value in dataset.items() if key != "subsets"}
        subsets = dataset.get("subsets", [])
        if not _is_tables(subsets) or not subsets:
            problems.append(
                f"'{path}': number {number + 1} of [[datasets]] has no [[datasets.subsets]]. Name its folders."
            )
            subsets = []
        tables.append(Table("datasets", number, said))
        tables += [Table("subsets", num_subsets + index, subset) for index, subset in enumerate(subsets)]
        num_subsets += len(subsets)
        made.datasets.append((said, subsets))
    problems += [problem for table in tables for problem in table.problems(path, lines)]
    if problems:
        raise error_of_problems(problems)
    return made


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _header(kind: str) -> str:
    return {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}[kind]


def _parsed(path: Path) -> tuple[dict[str, Any], Mapping[tuple[str, int, str], int]]:
    text = read_utf8(path)
    if path.suffix.lower() == ".json":
        content = parse_json(text, f"'{path}'", "or write the data set as TOML")
        if not isinstance(content, dict):
            raise UserError(f"'{path}': expected an object with 'general' and 'datasets'.", "Correct it.")
        return content, {}
    try:
        return tomllib.loads(text), lines_of_keys(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.", "Correct it there.") from error


def lines_of_keys(text: str) -> dict[tuple[str, int, str], int]:
    """Return the line of each key that stands on a line by itself, by kind and number of its table."""
    lines: dict[tuple[str, int, str], int] = {}
    counts = {"general": 0, "datasets": -1, "subsets": -1}
    kind = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+\s*([\w.]+)\s*\]", line)
        key = re.match(r"""\s*["']?(\w+)["']?\s*=""", line)
        if header:
            kind = header[1].rpartition(".")[2]
            counts[kind] = 0 if kind == "general" else counts.get(kind, -1) + 1
        elif key and kind:
            lines.setdefault((kind, counts[kind], key[1]), number)
    return lines
