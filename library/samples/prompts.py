"""The images that a prompt file asks for, checked before any model is loaded."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from library.config.config_file import parse_toml
from library.config.errors import UserError, nearest
from library.config.file_names import text_problem
from library.samples.sampler_names import SAMPLERS, sampler_of
from library.sdxl.sizes import PIXELS_PER_LATENT

MIN_SIDE, MAX_SIDE = 64, 8192  # pixels
MAX_CHARACTERS = 10_000  # each 75 tokens are another pass through both encoders
MAX_STEPS = 1000  # the length of the noise schedule
MAX_SEED = 2**64 - 1  # the largest that torch.Generator takes

_NO_DEFAULTS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class SamplePrompt:
    """One image to draw: a prompt and a negative prompt for each text encoder, and how to sample it.

    `width` and `height` are pixels, multiples of 8; None means the training resolution. `sampler` None means the
    sampler of the command line, `seed` None no fixed seed. `shared` is true if the file has one text for both
    encoders. `line` counts from 1: the line of a text file, the entry of a table file.
    """

    prompt_g: str
    prompt_l: str
    negative_g: str = ""
    negative_l: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 30
    sampler: str | None = None
    line: int = 1
    shared: bool = False
    guidance_rescale: float = 0.0


class _Said(NamedTuple):
    """The settings that one image of a file names, and where they stand."""

    settings: dict[str, Any]
    line: int
    where: str


def read_prompt_file(path: Path, defaults: Mapping[str, Any] = _NO_DEFAULTS) -> list[SamplePrompt]:
    """Return the images that a .txt, .toml or .json file asks for, in its order; `defaults` are for what it leaves out.

    Text: one image per line, as `a cat --e photographic --n ugly --w 1024`; blank lines and # comments are skipped.
    TOML: [[prompt]] tables, or kohya's [prompt] whose [[prompt.subset]] tables inherit from it. JSON: a list of
    objects or of lines; null is a setting left out. Sizes are rounded down to a multiple of 8. Without an L prompt both
    encoders read the G prompt. Raise `UserError`, with the place in the file, for the first mistake found.
    """
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"'{path}' is not a prompt file.", f"Its name must end in {', '.join(readers)}.")
    prompts = [_sample_prompt(said, defaults) for said in reader(path, _decoded(path))]
    if not prompts:
        raise UserError(f"'{path}' has no prompt.", "Write one image per line, for example: a cat --n ugly --s 28")
    return prompts


def parse_prompt_line(line: str, where: str, defaults: Mapping[str, Any] = _NO_DEFAULTS) -> SamplePrompt:
    """Return the image that `a cat --e photographic --w 1024` asks for. Raise `UserError`, which names `where`."""
    return _sample_prompt(_Said(_settings_of_line(line, where), 1, where), defaults)


# -- what a prompt can say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """One setting of a prompt: its option on a line, its keys in a table, its possible values."""

    option: str
    keys: tuple[str, ...]
    expected: str = "a text in quotes"
    kind: type[int] | type[float] | None = None  # None: text
    low: float = 0
    high: float = 0

    def value_of(self, raw: object) -> str | int | float | None:
        """Return `raw` (the text after an option, or a value of a table) as `kind`; None if it is out of range."""
        if self.kind is None:
            return raw.strip() if isinstance(raw, str) else None
        if isinstance(raw, bool) or not isinstance(raw, str | int | self.kind):
            return None
        try:
            number = self.kind(_bare(raw) if isinstance(raw, str) else raw)
        except (ValueError, OverflowError):
            return None
        return number if self.low <= number <= self.high else None


_SIDE = (f"a whole number of pixels from {MIN_SIDE} to {MAX_SIDE}", int, MIN_SIDE, MAX_SIDE)
_SETTINGS = {
    "prompt_g": _Setting("", ("prompt", "prompt_g")),
    "prompt_l": _Setting("e", ("prompt_l",)),
    "negative": _Setting("n", ("negative_prompt",)),
    "negative_g": _Setting("ng", ("negative_prompt_g",)),
    "negative_l": _Setting("nl", ("negative_prompt_l",)),
    "width": _Setting("w", ("width",), *_SIDE),
    "height": _Setting("h", ("height",), *_SIDE),
    "seed": _Setting("d", ("seed",), f"a whole number from 0 to {MAX_SEED}", int, 0, MAX_SEED),
    "guidance_scale": _Setting("l", ("scale", "guidance_scale"), "a number from 0 to 1000", float, 0, 1000),
    "guidance_rescale": _Setting("gr", ("guidance_rescale",), "a number from 0 to 1", float, 0, 1),
    "num_inference_steps": _Setting(
        "s", ("sample_steps", "num_inference_steps"), f"a whole number from 1 to {MAX_STEPS}", int, 1, MAX_STEPS
    ),
    "sampler": _Setting("ss", ("sample_sampler", "sampler"), f"one of {', '.join(SAMPLERS)}"),
}
_NAME_OF_OPTION = {setting.option: name for name, setting in _SETTINGS.items() if setting.option}
_NAME_OF_KEY = {key: name for name, setting in _SETTINGS.items() for key in setting.keys}

# An option is two dashes that follow a space and touch a letter: "a cat -- a dog" and "3--4" are text. Word processors
# make one long dash of the two; it begins an option only before the name of an option, or before a key and a number.
_OPTIONS = "|".join(sorted(_NAME_OF_OPTION, key=len, reverse=True))
_KEYS = "|".join(_NAME_OF_KEY)
_OPTION_WORD = re.compile(
    rf"(?:^|\s)(?:--([a-z]\S*)|[—–―−]-?((?:{_OPTIONS})(?:[=\d]\S*)?(?=\s|$)|(?:{_KEYS})(?=\s+\d)))", re.IGNORECASE
)

_NOTHING = re.compile("""[-—–―−]+|""|''""")
"""What kohya's users write for an empty text, as in `--n -`."""


def _bare(text: str) -> str:
    """Return a number or a name without the quotes round it and the comma behind it."""
    return text.strip(" \t,;'\"“”‘’")


def _checked(name: str, shown: str, raw: object, where: str) -> Any:
    """Return the value of the setting `name`, written as `shown`. Raise `UserError` with what is expected."""
    setting = _SETTINGS[name]
    value = setting.value_of(raw)
    if name == "sampler" and isinstance(value, str):
        value = sampler_of(_bare(value))
    if value is None:
        guess = nearest(_bare(str(raw)).lower(), SAMPLERS) if name == "sampler" else ""
        raise UserError(f"{where}: {shown} is '{raw}'.", f"{guess} It must be {setting.expected}.".lstrip())
    return value


def _sample_prompt(found: _Said, defaults: Mapping[str, Any]) -> SamplePrompt:
    """Return the image that the settings describe, with defaults for those left out."""
    said, line, where = {**defaults, **found.settings}, found.line, found.where
    if not said.keys() & {"prompt_g", "prompt_l"}:
        raise UserError(f"{where}: there is no prompt.", "Write the text of the image before any option.")
    texts = [text for text in said.values() if isinstance(text, str)]
    if problem := next(filter(None, map(text_problem, texts)), None):  # JSON can hold it, no image file can
        raise UserError(f"{where}: {problem}.", "Correct the text.")
    longest = max(len(text) for text in texts)
    if longest > MAX_CHARACTERS:
        raise UserError(f"{where}: a text has {longest} characters.", f"Keep it under {MAX_CHARACTERS}.")
    prompt_g = said.get("prompt_g", "")
    negative = said.get("negative", "")
    sides = {side: said[side] // PIXELS_PER_LATENT * PIXELS_PER_LATENT for side in ("width", "height") if side in said}
    sampling = ("seed", "guidance_scale", "guidance_rescale", "num_inference_steps", "sampler")
    return SamplePrompt(
        prompt_g=prompt_g,
        prompt_l=said.get("prompt_l", prompt_g),
        negative_g=said.get("negative_g", negative),
        negative_l=said.get("negative_l", negative),
        line=line,
        shared="prompt_l" not in said,
        **sides,
        **{name: said[name] for name in sampling if name in said},
    )


# -- text -------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, text: str) -> Iterator[_Said]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"'{path}', line {number}"
            yield _Said(_settings_of_line(line, where), number, where)


def _settings_of_line(line: str, where: str) -> dict[str, Any]:
    """Return the settings of `a cat --e photographic --w 1024`, by name."""
    options = list(_OPTION_WORD.finditer(line))
    starts = [*(option.start() for option in options), len(line)]
    prompt = line[: starts[0]].strip()
    said: dict[str, Any] = {"prompt_g": prompt} if prompt else {}
    for option, end in zip(options, starts[1:], strict=True):
        word, raw = option[1] or option[2], line[option.end() : end].strip()
        name = _NAME_OF_OPTION.get(word.lower())
        if name is None:
            raise _unknown_option(word, where)
        if name in said:
            raise UserError(f"{where}: --{word} is given twice.", "Keep one of the two.")
        is_empty = _SETTINGS[name].kind is None and _NOTHING.fullmatch(raw)
        said[name] = _checked(name, f"--{word}", "" if is_empty else raw, where)
    return said


def _unknown_option(word: str, where: str) -> UserError:
    # A long name ("--steps", "--width") leads to its short option.
    known = _NAME_OF_OPTION | {key: name for key, name in _NAME_OF_KEY.items() if _SETTINGS[name].option}
    before_equals_sign = word.partition("=")[0].lower()
    alike = [each for each in known if each[0] == before_equals_sign[0]]
    matches = get_close_matches(before_equals_sign, alike, n=1, cutoff=0.4)
    guess = f"Did you mean --{_SETTINGS[known[matches[0]]].option}, a space and a value? " if matches else ""
    options = " ".join(f"--{option}" for option in _NAME_OF_OPTION)
    remedy = f"{guess}The options are {options}. Write '-- {word}' or '-{word}' for text."
    return UserError(f"{where}: there is no option --{word}.", remedy)


# -- tables -----------------------------------------------------------------------------------------------------------


def _read_toml(path: Path, text: str) -> Iterator[_Said]:
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise UserError(f"'{path}' is not valid TOML: {error}.", "Correct the file.") from error
    prompt = document.pop("prompt", None)
    if document or not isinstance(prompt, dict | list):
        found = f"has '{next(iter(document))}'" if document else "has no prompt"
        raise UserError(f"'{path}' {found} at its top.", "Write [[prompt]] above each image, and nothing else there.")
    inherited = prompt if isinstance(prompt, dict) else {}
    entries = prompt.pop("subset", [{}]) if isinstance(prompt, dict) else prompt
    if not isinstance(entries, list):
        raise UserError(f"'{path}': 'subset' is not a list of tables.", "Write [[prompt.subset]] above each image.")
    common = _settings_of_table(inherited, f"'{path}', [prompt]")
    for number, entry in enumerate(entries, start=1):
        where = f"'{path}', prompt {number}"
        yield _Said(common | _settings_of_table(entry, where), number, where)


def _read_json(path: Path, text: str) -> Iterator[_Said]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}', line {error.lineno} is not valid JSON: {error.msg}.", "Correct that line."
        ) from error
    except (RecursionError, ValueError) as error:  # thousands of brackets, a number of thousands of digits
        raise UserError(f"'{path}' is not a list of prompts ({error}).", "Write the file again.") from error
    if not isinstance(entries, list):
        raise UserError(f"'{path}' is not a list.", 'Write the images as [{"prompt": "a cat"}, {"prompt": "a dog"}].')
    for number, entry in enumerate(entries, start=1):
        where = f"'{path}', prompt {number}"
        said = _settings_of_line(entry, where) if isinstance(entry, str) else _settings_of_table(entry, where)
        yield _Said(said, number, where)


def _settings_of_table(table: object, where: str) -> dict[str, Any]:
    """Return the settings of a table, whose names are spelled out, by name."""
    if not isinstance(table, dict):
        raise UserError(f"{where} is not a table.", 'Write its settings by name, as in prompt = "a cat".')
    said: dict[str, Any] = {}
    for key, raw in table.items():
        if raw is None and key in _NAME_OF_KEY:  # JSON's null
            continue
        name = _NAME_OF_KEY.get(key)
        if name is None:
            guess = nearest(key, _NAME_OF_KEY)
            remedy = f"{guess} The settings are {', '.join(_NAME_OF_KEY)}."
            raise UserError(f"{where}: there is no setting '{key}'.", remedy.lstrip())
        if name in said:
            raise UserError(
                f"{where}: '{key}' repeats a setting ({' / '.join(_SETTINGS[name].keys)}).", "Keep one of the two."
            )
        said[name] = _checked(name, f"'{key}'", raw, where)
    return said


def _decoded(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the prompt file '{path}': {error.strerror or error}.", "Check its path."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"'{path}', line {line} is not UTF-8 text.", "Save the file as UTF-8.") from error
