"""What is done to a caption to clean it: rules, and a pure function from texts and rules to texts."""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from library.annotation.booru_rules import cleaned_booru_tags
from library.annotation.tag_texts import SEPARATOR, joined_tags, split_tags, without_underscores
from library.config.errors import UserError
from library.editing.caption_edits import pattern_problem

_SPACE = f"\ufeff{string.whitespace}"
"""What stands around a line and is kept: a byte-order mark, too."""


class Rule(NamedTuple):
    """One step; `kind` is a key of `RULES`, or "move". Which of the values it reads stands there."""

    kind: str
    find: str = ""
    replace: str = ""
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        values = [f"'{self.find}' with '{self.replace}'"] if self.find else [*self.tags, *filter(None, [self.replace])]
        return " ".join([self.kind.replace("_", " "), ", ".join(values)]).strip()


class Cleaned(NamedTuple):
    """The texts of both encoders, and for each rule whether it changed any of them."""

    own: tuple[str, ...]
    other: tuple[str, ...]
    used: tuple[bool, ...]


def clean(text: str, rules: Sequence[Rule], separator: str = SEPARATOR) -> str:
    """Return one caption after rules that concern one encoder alone. Each of its lines, its variants, is cleaned."""
    return clean_captions([text], [], rules, separator).own[0]


def clean_captions(
    own: Sequence[str], other: Sequence[str], rules: Sequence[Rule], separator: str = SEPARATOR
) -> Cleaned:
    """Return the captions `own` of one encoder after all rules, and those of the `other` one, to which "move" adds.

    Line ends, and the space around each line, stay as they are; so does every line that no rule concerns.
    """
    texts, others, used = tuple(own), tuple(other), []
    for rule in rules:
        before = texts, others
        if rule.kind == "move":
            texts, others = _moved(texts, others, rule, separator)
        else:
            texts = _each_line(texts, partial(_applied, rule=rule, separator=separator))
        used.append((texts, others) != before)
    return Cleaned(texts, others, tuple(used))


def check_rule(rule: Rule, where: str) -> None:
    """Raise `UserError`, naming the place `where`, for a rule that cannot be applied."""
    if rule.kind in ("replace", "regex") and not rule.find:
        raise UserError(f"{where}: the text to find is empty.", "Write what is to be replaced.")
    if "\n" in rule.replace:
        raise UserError(f"{where}: a replacement has no line end: lines are variants.", "Write it on one line.")
    if rule.kind == "regex" and (reason := pattern_problem(rule.find, rule.replace)):
        raise UserError(
            f"{where}: '{rule.find}' with '{rule.replace}' is no regular expression: {reason}.",
            "Write it as Python's module re has it; in a text without \\ leave --regex off.",
        )


def _applied(line: str, rule: Rule, separator: str) -> str:
    return RULES[rule.kind](line, rule, separator)


def _moved(
    texts: Sequence[str], others: Sequence[str], rule: Rule, separator: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the captions without the tags of the rule, and those of the other encoder with what was taken out."""
    there = {tag for tags in _tags_of(texts, separator) for tag in tags}
    moved = [tag for tag in rule.tags if tag in there]
    if not moved:
        return tuple(texts), tuple(others)
    left = _each_line(texts, partial(_without, tags=moved, separator=separator))
    return left, _each_line(others or ("",), partial(_with, tags=moved, separator=separator))


def _each_line(texts: Sequence[str], change: Callable[[str], str]) -> tuple[str, ...]:
    return tuple(
        "".join(_changed(line, change, is_only=not text.strip(_SPACE)) for line in _lines(text)) for text in texts
    )


def _lines(text: str) -> list[str]:
    """Return the lines with their ends; an empty text has one."""
    return re.findall(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+", text) or [""]


def _changed(line: str, change: Callable[[str], str], *, is_only: bool) -> str:
    body = line.strip(_SPACE)
    if not body and not is_only:  # between variants
        return line
    start = len(line) - len(line.lstrip(_SPACE)) if body else 0
    return f"{line[:start]}{change(body)}{line[start + len(body) :]}"


def _tags_of(texts: Iterable[str], separator: str) -> list[list[str]]:
    return [split_tags(line.strip(_SPACE), separator) for text in texts for line in _lines(text)]


def _without(line: str, tags: Iterable[str], separator: str) -> str:
    return _by_tags(line, separator, lambda each: [tag for tag in each if tag not in set(tags)])


def _with(line: str, tags: Sequence[str], separator: str) -> str:
    return _by_tags(line, separator, lambda each: [*each, *(tag for tag in tags if tag not in each)])


def _by_tags(line: str, separator: str, change: Callable[[list[str]], Sequence[str]]) -> str:
    """Return a line after a change of its tags; the line as it was if they are the same."""
    tags = split_tags(line, separator)
    changed = list(change(tags))
    return line if changed == tags else joined_tags(changed, separator)


def _replaced(line: str, rule: Rule, separator: str) -> str:
    return _tidied(line, line.replace(rule.find, rule.replace), rule, separator)


def _replaced_by_pattern(line: str, rule: Rule, separator: str) -> str:
    return _tidied(line, _compiled(rule.find).sub(rule.replace, line), rule, separator)


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _tidied(before: str, after: str, rule: Rule, separator: str) -> str:
    """Return a line from which something was taken out, without the doubled spaces and separators it leaves."""
    if after == before or rule.replace:
        return after
    sign = separator.strip()
    words = re.sub(f" +(?={re.escape(sign)}| |$)", "", after).lstrip()
    tags = split_tags(words, separator)
    num_parts = words.count(sign) + 1
    return words if len(tags) == num_parts else joined_tags(tags, separator)


def _prefixed(line: str, rule: Rule, separator: str) -> str:
    return line if line.startswith(rule.replace) else f"{rule.replace}{line}"


def _sorted(tags: list[str]) -> list[str]:
    return sorted(tags, key=lambda tag: (tag.casefold(), tag))


RULES: dict[str, Callable[[str, Rule, str], str]] = {
    "replace": _replaced,
    "regex": _replaced_by_pattern,
    "remove": lambda line, rule, separator: _without(line, rule.tags, separator),
    "underscores_to_spaces": lambda line, rule, separator: _by_tags(
        line, separator, lambda tags: [without_underscores(tag) for tag in tags]
    ),
    "booru": lambda line, rule, separator: _by_tags(line, separator, cleaned_booru_tags),
    "deduplicate": lambda line, rule, separator: _by_tags(line, separator, lambda tags: list(dict.fromkeys(tags))),
    "sort": lambda line, rule, separator: _by_tags(line, separator, _sorted),
    "prefix": _prefixed,
}
"""What each kind does to a line: `find` with `replace`, `tags` to remove, a text to `replace` nothing at the start."""
