"""The flags of captions, for both encoders or one, and the rules that they resolve to."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from library.captions.draws import ENCODERS, Encoder
from library.captions.rules import EMPTY, ZEROS, CaptionDropout, CaptionRules, PairRules
from library.config.errors import UserError
from library.config.magnitudes import MOST_BATCHES, MOST_STEPS
from library.config.options import option, options_of

Level = Mapping[str, Any]
"""What one place says of captions, by flag name without dashes: a subset of a TOML file, or the command line.

None says nothing.
"""

SEPARATE, SHARED = "separate", "shared"
CAPTION_EXTENSIONS: Mapping[Encoder, str] = {"l": ".txt", "g": ".caption"}
_RATE: dict[str, Any] = {"least": 0, "most": 1}
_ROUNDING = 1e-9  # 0.7 + 0.2 + 0.1 is not 1 in floats

_Options = TypeVar("_Options")


def _per_encoder(help: str, **settings: Any) -> Any:
    """Return a flag that says nothing by default, and has the forms `_l` and `_g` beside the plain one."""
    field = option(None, help, **settings)
    return dataclasses.field(default=None, metadata={**field.metadata, "is_per_encoder": True})


def _with_forms_for_one_encoder(option_class: type[_Options]) -> type[_Options]:
    """Declare `<name>_l` and `<name>_g` behind each field that `_per_encoder` made."""
    annotations: dict[str, Any] = {}
    for name, annotation in option_class.__annotations__.items():
        annotations[name] = annotation
        field = getattr(option_class, name)
        if not (isinstance(field, dataclasses.Field) and field.metadata.get("is_per_encoder")):
            continue
        for encoder in ENCODERS:
            values = {setting: field.metadata[setting] for setting in ("choices", "least", "most")}
            form = option(None, f"--{name} for encoder {encoder.upper()} alone.", **values)
            setattr(option_class, f"{name}_{encoder}", form)
            annotations[f"{name}_{encoder}"] = annotation
    option_class.__annotations__ = annotations
    return option_class


@dataclass(frozen=True)
@_with_forms_for_one_encoder
class CaptionOptions:
    """What training does to captions. A plain flag means both encoders, with `_l` or `_g` one of them.

    None leaves the decision to a level farther away (in a TOML file: subset, dataset, general, then these flags), at
    last to the default of `CaptionRules`.
    """

    _argument_group_name: ClassVar[str] = "Captions"

    caption_extension: str | None = _per_encoder(
        "Read captions of images without metadata from files with this ending, one file for both encoders. Default: "
        ".txt for L, .caption for G.",
        aliases=["--caption_extention"],
    )
    caption_prefix: str | None = _per_encoder("Put this text and a space before each caption.")
    caption_suffix: str | None = _per_encoder("Put a space and this text after each caption.")
    enable_wildcard: bool | None = _per_encoder(
        "Choose one line of a caption of several lines, and one option of {a|b}, at random at each visit."
    )
    caption_separator: str | None = _per_encoder("Separate the tags of a caption by this. Default: a comma.")
    shuffle_caption: bool | None = _per_encoder("Put the tags of each caption into a random order at each visit.")
    keep_tokens: int | None = _per_encoder("Keep this many first tags in place. Default: 0.", least=0)
    keep_tokens_separator: str | None = _per_encoder(
        "Keep the tags before this text, and those after a second one, in place; overrides --keep_tokens. The text "
        "itself reaches no encoder."
    )
    secondary_separator: str | None = _per_encoder(
        "Hold tags together that this text separates; in the end it becomes the caption separator."
    )
    caption_tag_dropout_rate: float | None = _per_encoder(
        "Drop each tag that is not kept in place with this probability. Default: 0.", **_RATE
    )
    protected_tags: Path | None = _per_encoder(  # noqa: RUF009  # it makes a field
        "Never drop the tags of this file (UTF-8, one tag a line, upper and lower case alike)."
    )
    token_warmup_min: int | None = _per_encoder("Start tag warm-up with this many tags. Default: 1.", least=0)
    token_warmup_step: float | None = _per_encoder(
        "Reach the full number of tags after this many steps. Below 1 it is a fraction of all steps. Default: 0, no "
        "warm-up.",
        least=0,
        most=MOST_STEPS,
    )
    weighted_captions: bool | None = _per_encoder(
        r"Read (a:1.2), (a), [a] and \( in captions as weights of their tokens."
    )
    max_token_length: int | None = _per_encoder(
        "Cut captions at this many tokens: one, two or three chunks of 75. Default: 75.", choices=(75, 150, 225)
    )
    caption_variants: int | None = _per_encoder(
        "Draw this many texts of each image before training and use one of them at each visit, so that shuffled "
        "captions can be cached. Default: 0, a new text at each visit.",
        least=0,
        most=MOST_BATCHES,
    )
    dropped_caption: str | None = _per_encoder(
        "Replace a dropped caption by the encoding of an empty text, or by zeros (for G a zero pooled vector too). "
        "Default: empty.",
        choices=(EMPTY, ZEROS),
    )
    caption_dropout_rate: float | None = option(
        None,
        "Drop both captions of an image with this probability: the unconditional case of guidance. Default: 0.",
        **_RATE,
    )
    caption_dropout_rate_l: float | None = option(
        None, "Drop the L caption alone with this probability, besides --caption_dropout_rate. Default: 0.", **_RATE
    )
    caption_dropout_rate_g: float | None = option(
        None, "Drop the G caption alone with this probability, besides --caption_dropout_rate. Default: 0.", **_RATE
    )
    caption_dropout_every_n_epochs: int | None = option(
        None, "Drop both captions in epochs n, 2n, ... Default: 0, in none.", least=0
    )
    caption_dropout_every_n_epochs_l: int | None = option(
        None, "Drop the L caption in epochs n, 2n, ... Default: 0, in none.", least=0
    )
    caption_dropout_every_n_epochs_g: int | None = option(
        None, "Drop the G caption in epochs n, 2n, ... Default: 0, in none.", least=0
    )
    caption_draws: str | None = option(
        None,
        "Draw what is random for L and G independently (separate), or by the same numbers (shared): equal captions "
        "stay equal, and line n of L goes with line n of G. Default: separate.",
        choices=(SEPARATE, SHARED),
    )

    def problems(self) -> list[str]:
        """Return what cannot work."""
        return level_problems(vars(self), "--")


def resolve(levels: Sequence[Level]) -> PairRules:
    """Return the rules that hold where `levels` meet, the nearest first.

    For each setting of each encoder the nearest level that says anything decides; within a level the form for one
    encoder overrides the plain one. The plain rates of caption dropout are events by themselves and override nothing.
    Raise `UserError` for a file of protected tags that cannot be read.
    """
    dropout = CaptionDropout(
        **_decided(levels, {each.name: (each.name,) for each in dataclasses.fields(CaptionDropout)})
    )
    shared = _decided(levels, {"caption_draws": ("caption_draws",)}).get("caption_draws") == SHARED
    return PairRules(_rules(levels, "l"), _rules(levels, "g"), dropout, shared)


def caption_extension(levels: Sequence[Level], encoder: Encoder) -> str:
    """Return how the caption files of an encoder end where `levels` meet, the nearest first."""
    names = {"caption_extension": (f"caption_extension_{encoder}", "caption_extension")}
    return _decided(levels, names).get("caption_extension", CAPTION_EXTENSIONS[encoder])


def read_protected_tags(path: Path) -> frozenset[str]:
    """Return the tags of a file, one a line, case folded; raise `UserError` unless it can be read as UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"protected_tags: cannot read '{path}': {error.strerror or error}.", "Name a text file, one tag a line."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"protected_tags: '{path}' is not UTF-8 text.", "Save it as UTF-8.") from error
    return frozenset(line.strip().casefold() for line in lines if line.strip())


def level_problems(level: Level, dashes: str = "") -> list[str]:
    """Return what cannot work in one level, flags spelled with `dashes` before them.

    What several levels say together is `rule_problems`' to check.
    """
    said = {each.name: level.get(each.name) for each in dataclasses.fields(CaptionOptions)}
    problems = [
        problem.replace("--", dashes, 1)
        for each in options_of(CaptionOptions)
        if (problem := each.bound_problem(said[each.name]))
    ]
    problems += [
        f"{dashes}{name} is ''; it must not be empty."
        for name, value in said.items()
        if value == "" and name.startswith(("caption_separator", "caption_extension"))
    ]
    if problems:
        return problems
    try:
        return list(rule_problems(resolve([level]), dashes))
    except UserError as error:
        return [str(error)]


def rule_problems(rules: PairRules, dashes: str = "") -> Iterator[str]:
    """Yield what cannot work in rules as they are resolved, flags spelled with `dashes` before them."""
    total = rules.dropout.total_rate
    if total > 1 + _ROUNDING:
        yield (
            f"{dashes}caption_dropout_rate, {dashes}caption_dropout_rate_l and {dashes}caption_dropout_rate_g add up "
            f"to {total:.4g}; their events exclude each other, so the sum must be 1 or less."
        )
    for encoder in ENCODERS:
        yield from _encoder_problems(rules.of(encoder), encoder, dashes)
    both_choose_lines = rules.rules_l.enable_wildcard and rules.rules_g.enable_wildcard
    if rules.shared and both_choose_lines and rules.rules_l.caption_variants != rules.rules_g.caption_variants:
        yield (
            f"{dashes}caption_draws is shared, but {dashes}caption_variants differs between L and G, so their lines "
            "cannot be drawn together. Set the same number for both, or draw separately."
        )


def _encoder_problems(rules: CaptionRules, encoder: Encoder, dashes: str) -> Iterator[str]:
    name_of: dict[str, str] = {}
    for name in ("caption_separator", "keep_tokens_separator", "secondary_separator"):
        separator = getattr(rules, name)
        first = name_of.setdefault(separator, name)
        if separator and first != name:
            yield f"{dashes}{first} and {dashes}{name} of encoder {encoder.upper()} are both {separator!r}; change one."
    if rules.token_warmup_step > 0 and rules.caption_variants:
        yield (
            f"{dashes}token_warmup_step and {dashes}caption_variants of encoder {encoder.upper()} exclude each other: "
            "texts drawn before training cannot grow during it. Keep one of them."
        )


def _rules(levels: Sequence[Level], encoder: Encoder) -> CaptionRules:
    names = {each.name: (f"{each.name}_{encoder}", each.name) for each in dataclasses.fields(CaptionRules)}
    decided = _decided(levels, names)
    if "protected_tags" in decided:
        decided["protected_tags"] = read_protected_tags(decided["protected_tags"])
    return CaptionRules(**decided)


def _decided(levels: Sequence[Level], names: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Return the values that any level decides, each found under the first of its names that says anything."""
    said = {
        setting: [level[name] for level in levels for name in spellings if level.get(name) is not None]
        for setting, spellings in names.items()
    }
    return {setting: values[0] for setting, values in said.items() if values}
