"""A question about the images of a set, `l:cat NOT g:cat`, to a function that answers it for each of them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from library.captions.draws import ENCODERS, Encoder
from library.config.errors import UserError, listed, nearest
from library.editing.caption_set import CaptionSet, Member

Matches = Callable[[Member], bool]

HELP = (
    'cat: in either caption or the name. l:cat, g:cat: in one caption. l:[red hair]: a whole tag. g:"two words". '
    "cat*: the beginning of a word. no:l, no:g: without text. over:l, over:g: over the limit. both:cat: in both. "
    "is:error: cannot be read. subset:name, bucket:832x1216, name:01. a b: both. a OR b. NOT a, -a. ( )."
)

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<open>\() | (?P<close>\)) | (?P<minus>-(?=\S)) |
    (?:(?P<field>[a-z]+):)? (?: "(?P<quoted>[^"]*)"? | \[(?P<tag>[^\]]*)\]? | (?P<word>[^\s()"\[]+) )
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_FIELDS = ("l", "g", "both", "no", "over", "subset", "bucket", "name", "is")
ORDERS = ("name", "length_l", "length_g", "date", "number")


class _Token(NamedTuple):
    kind: str  # "(", ")", "NOT", "OR", "term"
    field: str = ""
    value: str = ""
    is_tag: bool = False


def found(caption_set: CaptionSet, query: str, order: str = "name", *, descending: bool = False) -> list[Member]:
    """Return the images that a question asks for, in an order. Raise `UserError` for a question that is none."""
    matches = parsed(query, caption_set)
    members = [member for member in caption_set.members if matches(member)]
    members.sort(key=_order_key(order), reverse=descending)
    return members


def parsed(query: str, caption_set: CaptionSet) -> Matches:
    """Return the function that a question means. Raise `UserError` that says what is wrong with it."""
    tokens = list(_tokens(query))
    if not tokens:
        return lambda member: True
    matches, rest = _any_of(tokens, caption_set)
    if rest:
        raise UserError("there is a ) too many.", "Remove it, or open it before.")
    return matches


def _tokens(query: str) -> Iterable[_Token]:
    place = 0
    while query[place:].strip():
        match = _TOKEN.match(query, place)
        if match is None:
            raise UserError(f"'{query[place:].strip()}' cannot be read here.", "Put what you look for in quotes.")
        place = match.end()
        if match["open"] or match["close"]:
            yield _Token(match["open"] or match["close"])
        elif match["minus"]:
            yield _Token("NOT")
        elif match["word"] in ("NOT", "OR", "AND") and not match["field"]:
            if match["word"] != "AND":
                yield _Token(match["word"])
        else:
            yield _term_token(match)


def _term_token(match: re.Match[str]) -> _Token:
    field, value = (match["field"] or "").lower(), match["quoted"] or match["tag"] or match["word"] or ""
    if not field and match["word"] and value[:-1].lower() in _FIELDS and value.endswith(":"):
        raise UserError(f"{value} needs something behind it.", f"Write it without a blank: {value}cat.")
    if field and field not in _FIELDS:
        raise UserError(
            f"there is no '{field}:'; there are {listed([f'{name}:' for name in _FIELDS])}.", nearest(field, _FIELDS)
        )
    return _Token("term", field, value, match["tag"] is not None)


def _any_of(tokens: Sequence[_Token], caption_set: CaptionSet) -> tuple[Matches, Sequence[_Token]]:
    parts, rest = [], tokens
    while True:
        part, rest = _all_of(rest, caption_set)
        parts.append(part)
        if not rest or rest[0].kind != "OR":
            return (parts[0] if len(parts) == 1 else _Any(tuple(parts))), rest
        rest = rest[1:]


def _all_of(tokens: Sequence[_Token], caption_set: CaptionSet) -> tuple[Matches, Sequence[_Token]]:
    parts, rest = [], tokens
    while rest and rest[0].kind not in ("OR", ")"):
        part, rest = _one(rest, caption_set)
        parts.append(part)
    if not parts:
        raise UserError("something is missing beside OR or a bracket.", "Write what to look for there.")
    return (parts[0] if len(parts) == 1 else _All(tuple(parts))), rest


def _one(tokens: Sequence[_Token], caption_set: CaptionSet) -> tuple[Matches, Sequence[_Token]]:
    first, rest = tokens[0], tokens[1:]
    if first.kind == "NOT":
        if not rest or rest[0].kind in ("OR", ")"):
            raise UserError("NOT needs something behind it.", "Write what to leave out: NOT l:cat.")
        inner, rest = _one(rest, caption_set)
        return _Not(inner), rest
    if first.kind == "(":
        inner, rest = _any_of(rest, caption_set)
        if not rest:
            raise UserError("a bracket is not closed.", "Write ) behind it.")
        return inner, rest[1:]
    return _term(first, caption_set), rest


@dataclass(frozen=True)
class _Any:
    parts: tuple[Matches, ...]

    def __call__(self, member: Member) -> bool:
        return any(part(member) for part in self.parts)


@dataclass(frozen=True)
class _All:
    parts: tuple[Matches, ...]

    def __call__(self, member: Member) -> bool:
        return all(part(member) for part in self.parts)


@dataclass(frozen=True)
class _Not:
    part: Matches

    def __call__(self, member: Member) -> bool:
        return not self.part(member)


def _term(token: _Token, caption_set: CaptionSet) -> Matches:
    value = token.value.casefold()
    if token.field in ("no", "over"):
        if value not in ENCODERS:
            raise UserError(f"{token.field}: needs l or g.", f"Write {token.field}:l or {token.field}:g.")
        encoder: Encoder = "l" if value == "l" else "g"
        return partial(_lacks if token.field == "no" else partial(_is_over, caption_set), encoder)
    if token.field == "subset":
        return lambda member: value in str(caption_set.subsets[member.subset].image_dir).casefold()
    if token.field == "bucket":
        return lambda member: str(member.bucket).replace(" ", "") == value
    if token.field == "is":
        if value != "error":
            raise UserError(f"there is no is:{token.value}.", "Write is:error for images and captions that are broken.")
        return lambda member: bool(member.problem or any(state.problem for state in member.captions.values()))
    if token.field == "name":
        return lambda member: value in member.name.casefold()
    held = partial(_holds_tag, caption_set, value) if token.is_tag else partial(_holds_words, _words(token.value))
    if token.field in ENCODERS:
        return lambda member: held(member, token.field)
    if token.field == "both":
        return lambda member: held(member, "l") and held(member, "g")
    return lambda member: held(member, "l") or held(member, "g") or value in member.name.casefold()


def _words(text: str) -> re.Pattern[str]:
    """Return the pattern of words that stand side by side; a star stands for the rest of a word."""
    inner = r"\s+".join(re.escape(word).replace(r"\*", r"\w*") for word in text.split())
    return re.compile(rf"(?<!\w){inner}(?!\w)", re.IGNORECASE)


def _holds_words(pattern: re.Pattern[str], member: Member, encoder: Encoder) -> bool:
    state = member.captions.get(encoder)
    return state is not None and any(pattern.search(variant) for variant in state.variants or ())


def _holds_tag(caption_set: CaptionSet, tag: str, member: Member, encoder: Encoder) -> bool:
    state = member.captions.get(encoder)
    if state is None or not state.variants:
        return False
    separator = caption_set.rules(member).of(encoder).caption_separator
    return any(
        piece.strip().casefold() == tag.strip() for variant in state.variants for piece in variant.split(separator)
    )


def _lacks(encoder: Encoder, member: Member) -> bool:
    state = member.captions.get(encoder)
    return state is not None and state.is_blank and state.problem is None


def _is_over(caption_set: CaptionSet, encoder: Encoder, member: Member) -> bool:
    state = member.captions.get(encoder)
    return state is not None and state.num_tokens > caption_set.rules(member).of(encoder).max_token_length


def _order_key(order: str) -> Callable[[Member], Any]:
    keys: dict[str, Callable[[Member], Any]] = {
        "name": lambda member: (_natural(member.name), member.number),
        "date": lambda member: (member.modified, member.number),
        "number": lambda member: member.number,
        **{
            f"length_{encoder}": lambda member, encoder=encoder: (  # type: ignore[misc]
                member.captions[encoder].num_tokens if encoder in member.captions else 0,
                member.number,
            )
            for encoder in ENCODERS
        },
    }
    if order not in keys:
        raise UserError(f"there is no order '{order}'; there are {listed(ORDERS)}.", nearest(order, ORDERS))
    return keys[order]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return what puts 2.jpg before 10.jpg."""
    parts = re.split(r"(\d{1,18})", name.casefold())
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]
